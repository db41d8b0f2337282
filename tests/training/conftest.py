"""What tests of data share: a tokenizer whose tokens are words that can be counted."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def words(datasets_cache) -> PreTrainedTokenizerFast:
    """Words "0" … "4999" are tokens 2 … 5001; <eos> is 1, any other word 0. No special tokens are added."""
    vocabulary = {"[UNK]": 0, "<eos>": 1} | {str(number): number + 2 for number in range(5000)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="[UNK]")
