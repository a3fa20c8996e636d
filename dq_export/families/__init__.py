"""Network architectures, one file each."""

from __future__ import annotations

from dq_export.core.plugins import load_plugins

from .ddpm import DDPM_FAMILY
from .dit import DIT
from .family import Family
from .flux import FLUX
from .flux2 import FLUX2
from .pixart import PIXART
from .sd3 import SD3_FAMILY
from .unet import UNET

FAMILIES: tuple[Family, ...] = (DIT, PIXART, SD3_FAMILY, FLUX, FLUX2, UNET, DDPM_FAMILY)


def all_families() -> tuple[Family, ...]:
    """dq-export's own families and those of plug-ins.

    Raises:
        PluginError: a plug-in cannot be used.
    """
    return (*FAMILIES, *load_plugins("families", Family, [family.name for family in FAMILIES]).values())
