"""Part of vLLM's module layout: the names that its scripts catch errors by.

A mistake in a prompt, a parameter or an option is a BadRequest or a BadConfig here, and all are FastqwenErrors.
"""

from fastqwen.errors import BadRequest as VLLMClientError
from fastqwen.errors import BadRequest as VLLMValidationError
from fastqwen.errors import FastqwenError as VLLMError
from fastqwen.errors import GenerationFailed as GenerationError
from fastqwen.errors import GenerationFailed as VLLMServerError

__all__ = ["GenerationError", "VLLMClientError", "VLLMError", "VLLMServerError", "VLLMValidationError"]
