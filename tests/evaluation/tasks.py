"""Tasks of lm-eval's kinds on texts made here: nothing is downloaded."""

from __future__ import annotations

import json
import random
from pathlib import Path

HEAD = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
fewshot_split: test
"""

CHOICE = """output_type: multiple_choice
doc_to_text: "Q: {{question}}\nA:"
doc_to_choice: "{{choices}}"
doc_to_target: answer
num_fewshot: 2
metric_list:
  - metric: acc
  - metric: acc_norm
"""

ROLLING = """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
"""

UNTIL = """output_type: generate_until
doc_to_text: "Q: {{question}}\nA:"
doc_to_target: "{{text}}"
generation_kwargs:
  until: ["e", "\n\n"]
  max_gen_toks: 24
  do_sample: false
metric_list:
  - metric: exact_match
"""


def write_tasks(folder: Path, documents: int = 12) -> list[str]:
    """One task of each kind in a folder; their names."""
    draw = random.Random(3)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "while", "déjà", "vu", "你好"]

    def sentence(least: int, most: int) -> str:
        return " ".join(draw.choice(words) for _ in range(draw.randint(least, most)))

    data = folder / "documents.jsonl"
    with open(data, "w", encoding="utf-8") as file:
        for _ in range(documents):
            choices = [sentence(1, 4) for _ in range(4)]
            row = {"question": sentence(3, 9), "choices": choices, "answer": draw.randrange(4), "text": sentence(5, 40)}
            file.write(json.dumps(row) + "\n")
    names = []
    for name, body in (("our_choice", CHOICE), ("our_rolling", ROLLING), ("our_until", UNTIL)):
        (folder / f"{name}.yaml").write_text(HEAD.format(name=name, data=data) + body)
        names.append(name)
    return names
