"""The tested versions of TRL, and the packages of which each needs another version than the tested one."""

REQUESTS = ("requests==2.32.5", "charset-normalizer==3.4.4", "urllib3==2.5.0")  # GRPO needs it, TRL requires none
TRANSFORMERS_4 = (  # and its requirements, in older versions
    *REQUESTS,
    "transformers==4.57.6", "huggingface_hub==0.36.0", "tokenizers==0.22.1", "datasets==4.4.1", "httpx==0.28.1",
    "httpcore==1.0.9", "h11==0.16.0",
)  # fmt: skip
VERSIONS: dict[str, tuple[str, ...]] = {
    "0.24.0": TRANSFORMERS_4,  # does not import with transformers 5
    "0.29.0": REQUESTS,
    "1.0.0": REQUESTS,
    "1.7.0": REQUESTS,
    "1.10.0": REQUESTS,
    "1.14.0": REQUESTS,
    "1.16.0": (),
}
