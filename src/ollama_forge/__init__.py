"""Find a chat model's refusal direction, edit it out of (or into) the weights, and measure what that did.

Importing this package imports neither torch nor transformers; the folders below it are the stages of the work.
"""

__version__ = "0.1.0"
