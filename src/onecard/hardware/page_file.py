"""Windows' error 1455: memory and page file together are used up."""

# ERROR_COMMITMENT_LIMIT: met while PyTorch's CUDA libraries are loaded, and where weights are mapped to memory.
PAGE_FILE_FULL = 1455
# safetensors and PyTorch give its number in words only: `(os error 1455)`, `error code: <1455>`.
_IN_WORDS = (f"os error {PAGE_FILE_FULL})", f"error code: <{PAGE_FILE_FULL}>")


def is_page_file_full(error: BaseException) -> bool:
    """Whether an error is that of a page file that has no room left, by its number or in its words."""
    if not isinstance(error, OSError | RuntimeError):
        return False
    return getattr(error, "winerror", None) == PAGE_FILE_FULL or any(words in str(error) for words in _IN_WORDS)
