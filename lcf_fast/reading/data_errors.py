"""What can be wrong with training data, as typed errors."""

from __future__ import annotations

from ..errors import LCFError

__all__ = ["AlignmentError", "DataError", "TokenizerError", "TooLongError"]


class DataError(LCFError, ValueError):
    """A data set, or one of its examples, is not as training needs it."""


class TooLongError(DataError):
    """An example has more tokens than allowed."""


class AlignmentError(DataError):
    """No token of an example's prompt has its like among the sharer's."""


class TokenizerError(LCFError, ValueError):
    """A tokenizer lacks what is asked of it: offsets, a token that ends a response, a chat template."""
