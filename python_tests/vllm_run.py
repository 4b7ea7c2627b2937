"""Continues prompts with vLLM, in whatever environment has it; test_vllm.py starts this as a program.

    python vllm_run.py MODEL DRAFT|none < request.json > answer.json

request: {"prompts": [[token ids]], "new_tokens": int}; answer: {"ids": [[token ids]], "drafts": int,
"accepted": int}, the last two as vLLM's own counters have them. vLLM is spoken to in token ids, so that
the model needs no tokenizer.
"""

import json
import os
import sys


def main() -> None:
    """Reads a request, writes an answer to the real standard output: vLLM prints to it as well."""
    answer_file = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    # Engine and caller in one process: one start less, and errors come back here.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams

    model, draft = sys.argv[1:]
    request = json.load(sys.stdin)
    speculative = {"method": "eagle", "model": draft, "num_speculative_tokens": 1}
    llm = LLM(
        model,
        skip_tokenizer_init=True,
        # In float32 one row and two rows of a product hardly ever differ by a token.
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=1,
        enable_prefix_caching=False,
        disable_log_stats=False,
        speculative_config=None if draft == "none" else speculative,
    )
    sampling = SamplingParams(
        temperature=0.0, max_tokens=request["new_tokens"], ignore_eos=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    counters = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    answer = {
        "ids": [list(output.outputs[0].token_ids) for output in outputs],
        "drafts": counters.get("vllm:spec_decode_num_draft_tokens", 0),
        "accepted": counters.get("vllm:spec_decode_num_accepted_tokens", 0),
    }
    print(json.dumps(answer), file=answer_file, flush=True)


if __name__ == "__main__":
    main()
