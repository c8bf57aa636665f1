"""The one error a workload input can raise."""


class WorkloadError(ValueError):
    """Bad input for a workload: the message says what, where, and what would be right."""
