def instruction_sets() -> list[str]: ...
def use(name: str, /) -> None: ...
def linear(
    x: int,
    x_shape: tuple[int, ...],
    x_type: int,
    bias: int,
    bias_type: int,
    y: int,
    weight: int,
    weight_shape: tuple[int, ...],
    in_features: int,
    out_features: int,
    int8: bool,
    threads: int,
    /,
) -> bool: ...
def round_groups(
    weight: int,
    weight_type: int,
    rows: int,
    columns: int,
    group_size: int,
    bits: int,
    symmetric: bool,
    importance: int,
    shrinks: tuple[float, ...],
    refits: int,
    packed: int,
    scales: int,
    zero_points: int,
    threads: int,
    /,
) -> None: ...
