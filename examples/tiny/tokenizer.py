"""Trains the tokenizer that both models share, and encodes the corpus with it.

python tokenizer.py --corpus build/corpus.jsonl --out build
writes build/tokenizer/ and build/tokens.safetensors.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

PAD, BOS, END = "<|pad|>", "<|bos|>", "<|end|>"
SPECIAL = (PAD, BOS, END, "<|system|>", "<|user|>", "<|assistant|>")
VOCAB_SIZE = 4096
CONTEXT = 1024
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")


def train(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE. `<|end|>` closes a document and a chat turn, so a model pretrained on documents knows to stop."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=list(SPECIAL[3:]),
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE.read_text(encoding="utf-8").removesuffix("\n"),
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """One stream `<|bos|> text <|end|> <|bos|> text …` as int16, and where each document starts in it as int32."""
    stream: list[int] = []
    starts: list[int] = []
    for ids in tokenizer(texts, return_attention_mask=False)["input_ids"]:
        starts.append(len(stream))
        stream.extend([*ids, tokenizer.eos_token_id])
    return torch.tensor(stream, dtype=torch.int16), torch.tensor(starts, dtype=torch.int32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=Path("build/corpus.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("build"))
    args = parser.parse_args()

    with args.corpus.open(encoding="utf-8") as file:
        documents = [json.loads(line) for line in file]
    tokenizer = train([document["text"] for document in documents if document["split"] == "train"])
    tokenizer.save_pretrained(args.out / "tokenizer")

    tensors = {}
    slices = {"train": ("wordnet", "python-docs"), "valid-wordnet": ("wordnet",), "valid-python-docs": ("python-docs",)}
    for name, sources in slices.items():
        split = name.partition("-")[0]
        texts = [
            document["text"] for document in documents if document["split"] == split and document["source"] in sources
        ]
        tensors[f"{name}.tokens"], tensors[f"{name}.starts"] = encode(tokenizer, texts)
        tokens, characters = len(tensors[f"{name}.tokens"]), sum(map(len, texts))
        print(f"{name:18} {len(texts):8,} documents {tokens:12,} tokens {characters / tokens:.2f} characters a token")
    save_file(tensors, args.out / "tokens.safetensors")


if __name__ == "__main__":
    main()
