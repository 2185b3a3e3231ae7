"""True bytes of a model."""

from collections.abc import Container

from torch import Tensor, nn

from fxquant.modules.linear_intn import QuantizedLinearIntN

MEGABYTE = 1_000_000


def model_bytes(model: nn.Module, without: Container[nn.Module] = ()) -> int:
    """Bytes of all parameters and buffers that a saved model needs; tied tensors count once.

    Packed weights count as they are saved; `_kernel_*` buffers hold them as a kernel reads them.

    Args:
        model: whose tensors are counted.
        without: modules whose own tensors are left aside, unless others hold them too.
    """
    counted: dict[tuple[int, int], int] = {}
    packed = 0
    for module in model.modules():
        if module in without:
            continue
        if isinstance(module, QuantizedLinearIntN):
            packed += module.saved_bytes
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and not name.startswith("_kernel_"):
                counted[tensor.data_ptr(), stored_elements(tensor)] = (
                    stored_elements(tensor) * tensor.element_size()
                )
    return packed + sum(counted.values())


def stored_elements(tensor: Tensor) -> int:
    """Elements in memory: a dimension that was expanded (stride 0) counts once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count
