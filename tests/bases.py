"""Tokenizers of small base models, trained on the spot: one of each algorithm."""

import json
import os
import subprocess

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = [
    *["where were you?\n", "at home. did you water the plants?\n", "yes, what did you do today!\n"] * 20,
    *["Below is a conversation between the user and the agent.\n\n### User\n### Agent\n"] * 20,
    *["abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ 0123456789 .,!?'#-:;<|>()\n"] * 5,
]
# As in GPT-4 and its successors: punctuation takes the newlines after it along.
_PUNCTUATION = Regex(r" ?[^\s\p{L}\p{N}]+[\r\n]*| ?\p{L}+|\p{N}| ?\s+")


def byte_level():
    """Like Qwen's and Llama 3's: no BOS, EOS is a special token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(_PUNCTUATION, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", additional_special_tokens=["<|im_start|>"]
    )


def unigram():
    """Like Gemma's: BOS before every text, "▁" for spaces; a newline has no token."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Replace("\n", " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<s>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(
        TEXTS, trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def word_piece():
    """Like BERT's: lower-cased, no BOS or EOS of a language model; a newline is lost."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(
        TEXTS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


BASES = {"byte-level": byte_level, "unigram": unigram, "word-piece": word_piece}


TRANSFORMERS_4 = """
import json, sys, transformers
assert transformers.__version__.startswith("4.")
loaded = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
print(json.dumps([len(loaded), [loaded(text).input_ids for text in json.load(sys.stdin)]]))
"""


def ids_of_transformers_4(folder, texts):
    """The size of a tokenizer and its ids of texts in transformers 4.57, whose Python `USDM_TRANSFORMERS_4` names."""
    command = [os.environ["USDM_TRANSFORMERS_4"], "-c", TRANSFORMERS_4, str(folder)]
    done = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)
