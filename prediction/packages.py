"""Optional packages."""

from importlib import import_module

from utils.errors import InputError


def require_packages(option: str, packages: tuple[str, ...]) -> None:
    """Raise InputError, naming the option and the package, if one of `packages` is not installed."""
    for package in packages:
        try:
            import_module(package)
        except ImportError as error:
            raise InputError(
                f"{option} needs the package {package}, which is not installed: pip install {' '.join(packages)}"
            ) from error
