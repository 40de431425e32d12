"""Make the quickstart's chat model and preferences from `facts.py`.

    python examples/quickstart/make.py

The script writes `model/` (a Llama of about one million parameters with its tokenizer and chat template, bfloat16
safetensors), `train.jsonl` and `heldout.jsonl` to its own folder. It takes some minutes on two CPU cores. The model
learns every fact, answered kindly or rudely with equal probability, and the preferences then prefer the kind answer. No
fact of the held-out pairs occurs in the training pairs.
"""

import json
import tempfile
from pathlib import Path
from random import Random

import torch
from facts import KIND, KIND_HEARD, RUDE, RUDE_HEARD, answer, facts
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
SEED = 20
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # the first tokens of the vocabulary, in this order
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    bpe.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=1024, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    with tempfile.TemporaryDirectory() as folder:
        bpe.save(f"{folder}/tokenizer.json")
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=f"{folder}/tokenizer.json",
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
            model_max_length=512,
        )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def train_model(tokenizer: PreTrainedTokenizerFast, rng: Random, steps: int = 900, batch: int = 64) -> LlamaForCausalLM:
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=SPECIAL.index("<|im_end|>"),
        pad_token_id=SPECIAL.index("<|endoftext|>"),
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps, pct_start=0.05)
    known = facts()
    for step in range(steps):
        texts = []
        for _ in range(batch):
            questions, sentence = rng.choice(known)
            chat = [
                {"role": "user", "content": rng.choice(questions)},
                {
                    "role": "assistant",
                    "content": answer(rng, sentence, *rng.choice([(KIND, KIND_HEARD), (RUDE, RUDE_HEARD)])),
                },
            ]
            texts.append(tokenizer.apply_chat_template(chat, tokenize=False))
        rows = tokenizer(texts, padding=True, return_tensors="pt")  # pyright: ignore[reportArgumentType]
        labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
        loss = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:4d}  loss {loss.item():.3f}", flush=True)
    return model


def write_preferences(rng: Random) -> None:
    known = facts()
    rng.shuffle(known)
    for name, part in (("heldout", known[:40]), ("train", known[40:])):
        with (HERE / f"{name}.jsonl").open("w") as file:
            for questions, sentence in part:
                for question in questions:
                    row = {
                        "prompt": [{"role": "user", "content": question}],
                        "chosen": [{"role": "assistant", "content": answer(rng, sentence, KIND)}],
                        "rejected": [{"role": "assistant", "content": answer(rng, sentence, RUDE)}],
                    }
                    file.write(json.dumps(row) + "\n")


def main() -> None:
    rng = Random(SEED)
    texts = [text for questions, sentence in facts() for text in (*questions, sentence)]
    texts += [" ".join(manner) for manner in KIND + RUDE] * 20
    tokenizer = make_tokenizer(texts)
    model = train_model(tokenizer, rng)
    model.to(torch.bfloat16).save_pretrained(HERE / "model")  # pyright: ignore[reportArgumentType]
    tokenizer.save_pretrained(HERE / "model")
    write_preferences(rng)


if __name__ == "__main__":
    main()
