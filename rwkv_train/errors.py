"""Errors that the user can correct. Everything in the package may import this module; it imports nothing."""


class UserError(Exception):
    """An error in a setting, a path or a data file: printed without a traceback, exit code 2.

    Args:
        what: one sentence that names what is wrong and its value.
        remedy: what to type or change instead, printed on its own line.
    """

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.what}\n  {self.remedy}" if self.remedy else self.what


class UserErrors(UserError):
    """Several errors that were found together, printed in one block."""

    def __init__(self, problems: list[UserError]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = problems
