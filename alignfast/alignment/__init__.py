"""Model alignment: fine-tuning a source toward witnesses (Ma et al., ECCV 2024, arXiv 2311.18495)."""

from alignfast.alignment.config import AlignConfig
from alignfast.alignment.loop import AlignResult, align
from alignfast.alignment.snapshots import Snapshots

__all__ = ["AlignConfig", "AlignResult", "Snapshots", "align"]
