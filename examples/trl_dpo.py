"""Train the quickstart's model by DPO with TRL, for twenty steps on a CPU. The script does not use fastpref.

python examples/trl_dpo.py
python -m fastpref.patch --report examples/trl_dpo.py
"""

from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

HERE = Path(__file__).parent / "quickstart"

trainer = DPOTrainer(
    model=AutoModelForCausalLM.from_pretrained(HERE / "model"),
    ref_model=AutoModelForCausalLM.from_pretrained(HERE / "model"),
    args=DPOConfig(
        output_dir="runs/trl-dpo",
        max_steps=20,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
    ),
    train_dataset=Dataset.from_json(str(HERE / "train.jsonl")),
    processing_class=AutoTokenizer.from_pretrained(HERE / "model"),
)
trainer.train()
