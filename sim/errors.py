"""The errors of a simulation."""


class ScenarioError(ValueError):
    """Bad scenario or command line: the message says what, where, and what would be right."""


class LivelockError(ScenarioError):
    """The simulated engine goes on for ever without a token, as the real one would."""


class AdapterError(RuntimeError):
    """Adapters that the manager cannot bring where they are wanted."""


class IntegrityError(AssertionError):
    """An invariant is broken: a defect of the simulator, never of its input."""
