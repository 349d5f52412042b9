"""Run by other versions of transformers and PEFT: opens what jlora wrote and notes what it computes there.

python elsewhere.py JOBS.json: [{"model": DIR, "adapter": DIR or null, "tokens": [[…]], "text": …, "out": FILE.npz}]
"""

import json
import pathlib
import sys

import numpy as np
import torch
import transformers


def opened(job):
    """The model in float32, its adapter on it, and the dtype that its folder asks for."""
    name = transformers.AutoModelForCausalLM
    asked = name.from_pretrained(job["model"], dtype="auto").dtype
    model = name.from_pretrained(job["model"], dtype=torch.float32, attn_implementation="eager")
    if job["adapter"]:
        import peft

        model = peft.PeftModel.from_pretrained(model, job["adapter"])
    return model.eval(), asked


def main(path):
    for job in json.loads(pathlib.Path(path).read_text(encoding="utf-8")):
        model, asked = opened(job)
        with torch.no_grad():
            logits = model(torch.tensor(job["tokens"]), use_cache=False).logits.numpy()
        found = {"logits": logits, "dtype": str(asked)}
        if job["text"]:
            tokenizer = transformers.AutoTokenizer.from_pretrained(job["model"])
            found["ids"] = tokenizer(job["text"]).input_ids
            found["chat"] = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
        np.savez(job["out"], **found)


if __name__ == "__main__":
    main(sys.argv[1])
