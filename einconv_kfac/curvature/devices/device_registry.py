"""The profile of each type of device: those of the files in ``profiles/``."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from einconv_kfac.curvature.devices import profiles
from einconv_kfac.curvature.devices.profile import DeviceProfile

OTHERWISE = "cuda"
"""The device whose prices serve for types of devices without a file."""


def built_in_profiles() -> dict[str, DeviceProfile]:
    """Return the profiles of the files in ``profiles/``, by type of device."""
    names = [file.name for file in iter_modules(profiles.__path__, f"{profiles.__name__}.")]
    found: list[DeviceProfile] = [import_module(name).PROFILE for name in names]
    return {profile.device: profile for profile in found}


PROFILES = built_in_profiles()
UNKNOWN = PROFILES[OTHERWISE].of_unknown()


def profile_of(device: str) -> DeviceProfile:
    """Return the profile of a type of device.

    >>> profile_of("cuda").multiplies_by_onednn
    False
    """
    return PROFILES.get(device, UNKNOWN)
