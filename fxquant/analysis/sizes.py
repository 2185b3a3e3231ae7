"""True bytes of a model."""

from torch import Tensor, nn

MEGABYTE = 1_000_000


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers that a saved model needs; tied tensors count once.

    Layouts that kernels derive (`_kernel_*` buffers) are not saved and do not count.
    """
    counted: dict[tuple[int, int], int] = {}
    for module in model.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and not name.startswith("_kernel_"):
                counted[tensor.data_ptr(), stored_elements(tensor)] = (
                    stored_elements(tensor) * tensor.element_size()
                )
    return sum(counted.values())


def stored_elements(tensor: Tensor) -> int:
    """Elements in memory: a dimension that was expanded (stride 0) counts once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count
