"""Every error this package raises on purpose. One line each: what is wrong, and what to do about it."""


class GLMError(Exception):
    """The base of them all: `except glm.GLMError` catches everything the package refuses."""


class CheckpointError(GLMError):
    """A checkpoint folder that is not exactly what its release promises. Names the file and the tensor."""


class ConfigError(CheckpointError):
    """A `config.json` (or a training recipe) that describes no model this package can build."""


class TokenizerError(GLMError):
    """Vocabulary files that are missing, damaged or of an unknown kind, or text that cannot be encoded."""


class PromptError(GLMError, ValueError):
    """Messages that do not form a conversation, or a chat template that failed or ran out of its budget."""


class LayoutError(GLMError, ValueError):
    """Token ids, positions or visibility that do not fit together."""


class CacheError(GLMError, ValueError):
    """More tokens than the cache was made for."""


class MemoryFitError(GLMError):
    """A model that cannot fit into the memory found."""


class ParallelError(GLMError):
    """A model that cannot be dealt out to so many processes, or a command that only one process can run."""


class GenerationError(GLMError, ValueError):
    """Sampling parameters or prompts outside their range."""


class TraceError(GLMError, LookupError):
    """A forward pass that cannot be traced, a step it does not have, or a text too long for a page."""
