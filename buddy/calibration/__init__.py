"""What a router may measure before use, each thing once: `Probe`."""

from buddy.calibration.probe import Probe, Track
from buddy.calibration.store import cache_folder

__all__ = ["Probe", "Track", "cache_folder"]
