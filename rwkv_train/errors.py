"""The errors that a user can mend. Everything in the package may import this module; it imports nothing."""


class UserError(Exception):
    """A mistake in a config, a path or a data file: shown without a traceback, exit code 2.

    Args:
        what: one sentence that names the thing and its value.
        remedy: what to type or change instead, shown on a line of its own.
    """

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.what}\n  {self.remedy}" if self.remedy else self.what


class UserErrors(UserError):
    """Several mistakes found together, printed in one block."""

    def __init__(self, problems: list[UserError]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = problems
