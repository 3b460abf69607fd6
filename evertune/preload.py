"""Imported once by the fork server, so that every child starts with the heavy libraries in memory.

Nothing here may start a thread or run a kernel: children are forked from this process.
"""

import peft
import torch
import transformers.modeling_utils
import transformers.models.auto.modeling_auto

__all__ = ["peft", "torch", "transformers"]
