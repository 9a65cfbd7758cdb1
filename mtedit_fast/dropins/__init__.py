"""Step functions with the signatures, returns and semantics of other projects, on :func:`mtedit_fast.ops.sde_step`.

One module per project: ``flow_grpo``, ``diffusion_nft``, ``mixgrpo``. To switch, change the import.
"""
