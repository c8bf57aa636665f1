"""The one error a backend request can raise."""


class BackendError(ValueError):
    """A model, device or profile cannot do what was asked: the message says what, where, and what would be right."""
