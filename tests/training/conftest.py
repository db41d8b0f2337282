"""What these tests share: a tokenizer whose tokens are words that can be counted, and a way to fit a module."""

import lightning
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from buddy.console import quiet
from buddy.data.module import TextData
from tests.tiny import tiny_tokenizer


@pytest.fixture(scope="session")
def words(datasets_cache) -> PreTrainedTokenizerFast:
    """Words "0" … "4999" are tokens 2 … 5001; <eos> is 1, any other word 0. No special tokens are added."""
    vocabulary = {"[UNK]": 0, "<eos>": 1} | {str(number): number + 2 for number in range(5000)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="[UNK]")


@pytest.fixture
def text(small) -> TextData:
    """Windows of 32 tokens of the small text."""
    return TextData(str(small.text), tiny_tokenizer(), window=32)


@pytest.fixture
def run(text, tmp_path):
    """Fits a module for so many steps, without validation, and gives back its trainer."""

    def run(module, steps, ckpt_path=None, **options) -> lightning.Trainer:
        off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        defaults = dict.fromkeys(off, False) | {"limit_val_batches": 0, "num_sanity_val_steps": 0}
        settings = {"max_steps": steps, "accelerator": "cpu", "default_root_dir": tmp_path}
        with quiet():
            trainer = lightning.Trainer(**(defaults | settings | options))
            trainer.fit(module, datamodule=text, ckpt_path=ckpt_path, weights_only=True)
        return trainer

    return run
