"""Continues prompts with vLLM; test_vllm.py runs this program in an environment that has vLLM.

    python vllm_run.py MODEL DRAFTER|none < request.json > answer.json

request: {"prompts": [[token ids]], "new_tokens": int}; answer: {"ids": [[token ids]], "drafted": int, "accepted": int},
the counts from vLLM's metrics. Prompts and continuations are token ids, so that the model needs no tokenizer.
"""

import json
import os
import sys


def main() -> None:
    """Reads the request and writes the answer. vLLM also prints to standard output: that goes to standard error."""
    answer_file = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    # Engine and caller in one process: the start is faster, and an exception reaches the caller.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams

    model, drafter = sys.argv[1:]
    request = json.load(sys.stdin)
    speculative = {"method": "eagle", "model": drafter, "num_speculative_tokens": 1}
    llm = LLM(
        model,
        skip_tokenizer_init=True,
        # In float32, rounding hardly ever makes a token depend on the number of rows of a matmul.
        dtype="float32",
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=1,
        enable_prefix_caching=False,
        disable_log_stats=False,
        speculative_config=None if drafter == "none" else speculative,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=request["new_tokens"], ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    counters = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    answer = {
        "ids": [list(output.outputs[0].token_ids) for output in outputs],
        "drafted": counters.get("vllm:spec_decode_num_draft_tokens", 0),
        "accepted": counters.get("vllm:spec_decode_num_accepted_tokens", 0),
    }
    print(json.dumps(answer), file=answer_file, flush=True)


if __name__ == "__main__":
    main()
