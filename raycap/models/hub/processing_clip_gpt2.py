"""The processor of CLIP-GPT2 for plain transformers: images, and texts that begin with the first token."""

# mypy: allow-untyped-calls
# because transformers leaves some of what is called here without types

from typing import Any

from transformers import BatchFeature, ProcessorMixin


class ClipGpt2Processor(ProcessorMixin):
    """processor(images, text) -> pixel_values, input_ids, attention_mask."""

    def __init__(self, image_processor: Any, tokenizer: Any, **kwargs: Any) -> None:
        super().__init__(image_processor, tokenizer, **kwargs)

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        return_tensors: str | None = None,
        padding: Any = True,  # noqa: ARG002  # pipelines give it
        **kwargs: Any,
    ) -> BatchFeature:
        """images: one or a list. text: a prompt for each image, or one for all of them; None and "" mean no prompt.

        input_ids begin with the first token; padding, whatever `padding` is, is behind it, so that prompts end together.
        kwargs: of the image processor.
        """
        data = {} if images is None else dict(self.image_processor(images, **kwargs))
        num_texts = len(data["pixel_values"]) if images is not None else 1
        texts = text if isinstance(text, list) else [text or ""] * num_texts
        rows = [self.tokenizer.encode(each, add_special_tokens=False) for each in texts]
        length = max(map(len, rows)) + 1
        first_id, pad_id = self.tokenizer.bos_token_id, self.tokenizer.pad_token_id
        pad_id = self.tokenizer.eos_token_id if pad_id is None else pad_id
        data["input_ids"] = [[first_id, *[pad_id] * (length - 1 - len(row)), *row] for row in rows]
        data["attention_mask"] = [[1, *[0] * (length - 1 - len(row)), *[1] * len(row)] for row in rows]
        return BatchFeature(data, tensor_type=return_tensors)
