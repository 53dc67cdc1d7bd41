"""Every error that a user can cause, as one small tree.

    OpenNemoError
    ├── InvalidRequest          the request is wrong: what, where, and what is allowed (HTTP 400)
    │   └── ContextTooLong      more tokens than the model has positions; names both numbers
    ├── Unavailable             whoever was answering is lost; ask again (HTTP 503)
    │   └── Overloaded          too much is waiting already; try again later (HTTP 503)
    └── CheckpointError         a model folder, or a file of one, cannot be used

The command line prints one as a single line and exits with code 2; the server answers with its
status. Anything else that escapes is a defect of ours and keeps its traceback.
"""


class OpenNemoError(Exception):
    """The root of the tree: catch this to catch everything a user can cause."""


class InvalidRequest(OpenNemoError):
    """A prompt, conversation or setting that cannot be served as it stands."""


class ContextTooLong(InvalidRequest):
    """A prompt, with the tokens it asks for, does not fit the model's context."""

    def __init__(self, n_tokens: int, max_tokens: int):
        super().__init__(
            f"the prompt needs {n_tokens:,} tokens of context, "
            f"but this model has room for {max_tokens:,}"
        )
        self.n_tokens, self.max_tokens = n_tokens, max_tokens


class Unavailable(OpenNemoError):
    """What was answering, or would have, is gone for now; the request itself is right."""


class Overloaded(Unavailable):
    """The queue of requests is full."""


class CheckpointError(OpenNemoError):
    """A model folder is missing, incomplete, damaged, or of a kind that is not supported."""
