"""Transfer measured: matrices, statistics, pictures and the report."""

from alignfast.evaluation.matrix import transfer_matrix
from alignfast.evaluation.matrix_result import Cell, Comparison, Rate, TransferMatrix

__all__ = ["Cell", "Comparison", "Rate", "TransferMatrix", "transfer_matrix"]
