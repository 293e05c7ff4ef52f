"""The training step of `experiments.profile`, as PyTorch, transformers and PEFT take it.

    python -m experiments.peers --block opt-2048 --out DIR
    python -m experiments.peers --block opt-2048,llama-4096 --module block --remat both --out DIR

It needs torch, transformers and peft, which the project does not. `pip install . torch transformers
peft` makes an environment that has both; its huggingface-hub may be older than the one that
constraints.txt pins, since transformers wants one below 2.

A step is forward, backward from the output's square as its gradient, down to that of the input, and
AdamW. The layer is transformers' own (`OPTDecoderLayer`, `LlamaDecoderLayer`, `BertLayer`) with
random weights, sizes of the same name in `spt_jax.models.presets`, no dropout and no padding mask;
its halves are its own submodules with norm and residual connection. Attention is
`scaled_dot_product_attention`, which on a GPU may take its flash kernel only, and raises where that
cannot run. Rotary angles are formed before the step, as a model forms them once for all its layers.

* `torch full` trains float32 weights under `torch.autocast` to bfloat16, with the fused AdamW.
* `peft lora` is what `get_peft_model` makes of a layer in bfloat16: weights frozen in bfloat16,
  factors in float32 (PEFT's default), and so both skinny products in float32, at PyTorch's default
  precision of a float32 product. The column `lora_form` says skinny_float32.
* `peft lora autocast` is the same layer under `torch.autocast`, as transformers' Trainer runs it
  with `bf16=True`: the skinny products are in bfloat16. `lora_form` is skinny.
* `compiled` says that `torch.compile` made forward and backward; the optimizer is not compiled.

Rank, scaling and the adapted maps are those of `spt_jax.LoRAConfig`. Rematerialization is
`torch.utils.checkpoint`. On a CPU everything is in float32 and there is no autocast.

Methods run one after the other, alone on the device. On a GPU events in the stream time the steps,
which follow each other without waiting for the host, as in training; a step of
`experiments.profile` is timed from its call to its end, which is to PyTorch's advantage. A table
shows medians and, in brackets, the interquartile range, and the most memory that tensors took in
the timed steps. Writes peers.csv, with the columns of profile.csv but its ratios, and, last,
metrics.json under --out.
"""
