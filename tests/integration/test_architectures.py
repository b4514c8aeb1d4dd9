"""Does everything hold on the decoders that transformers has, against the Hugging Face model with a plain forward hook?"""

import json
import warnings
from pathlib import Path

import pytest
import torch
import transformer_lens
from importlib.metadata import version
from peft import PeftModel

import melbo_lens as ml
from melbo_lens import hooks
from tests import architectures, models
from tests.architectures import CLEAR, PROMPTS, SOURCE, TARGET, Plain
from tests.architectures import outcome
