"""Imports of a fresh process (`tests/fresh.py`): libraries, and no module of ours."""

import accelerate  # noqa: F401
import datasets  # noqa: F401
import deepspeed  # noqa: F401
import peft  # noqa: F401
import torch  # noqa: F401
from accelerate.commands.launch import launch_command  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer  # noqa: F401
