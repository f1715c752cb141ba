"""The learning rate."""


def poly(step: int, total: int, power: float = 0.9) -> float:
    """Factor of the base learning rate at iteration `step` of `total`: (1 - t/T)^0.9."""
    return (1 - step / total) ** power
