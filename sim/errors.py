"""The one error a scenario can raise."""


class ScenarioError(ValueError):
    """Bad scenario or command line: the message says what, where, and what would be right."""
