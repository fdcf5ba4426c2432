"""The hub's task of a model (`pipeline_tag` in its card), from the class that its config names."""

from __future__ import annotations

from collections.abc import Mapping

# The end of a class's name -> task; the first that fits. Names are those of the hub's tasks, huggingface.co/tasks.
_TASKS = {
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForMaskedLM": "fill-mask",
    "WithLMHeadModel": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForDocumentQuestionAnswering": "document-question-answering",
    "ForQuestionAnswering": "question-answering",
    "ForQuestionAnsweringSimple": "question-answering",
    "ForMultipleChoice": "multiple-choice",
    "ForImageClassification": "image-classification",
    "ForImageClassificationWithTeacher": "image-classification",
    "ForVideoClassification": "video-classification",
    "ForAudioClassification": "audio-classification",
    "ForObjectDetection": "object-detection",
    "ForSemanticSegmentation": "image-segmentation",
    "ForUniversalSegmentation": "image-segmentation",
    "ForInstanceSegmentation": "image-segmentation",
    "ForDepthEstimation": "depth-estimation",
    "ForSpeechSeq2Seq": "automatic-speech-recognition",
    "ForCTC": "automatic-speech-recognition",
    "ForTextToSpeech": "text-to-speech",
    "ForImageTextToText": "image-text-to-text",
    "ForVision2Seq": "image-text-to-text",
}
# PEFT's task_type -> task
ADAPTER_TASKS = {
    "CAUSAL_LM": "text-generation",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}
_SPEECH_INPUTS = ("num_mel_bins", "feat_extract_norm", "conv_dim")  # config keys of models with audio input
_VISION_INPUTS = ("vision_config", "image_size", "patch_size")


def task_of(config: Mapping[str, object], embeds: bool = False) -> str | None:
    """The task; None where the config does not say which.

    Args:
        config: config.json.
        embeds: whether the model has modules of sentence-transformers.
    """
    if embeds:
        return "sentence-similarity"
    named = config.get("architectures")
    name = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    if name.endswith("ForConditionalGeneration"):
        return _generating(config)
    hears = any(key in config for key in _SPEECH_INPUTS)
    if hears and name.endswith("ForSequenceClassification"):
        return "audio-classification"
    task = _TASKS.get(max((end for end in _TASKS if name.endswith(end)), key=len, default=""))
    if task is None and name.endswith("Model"):
        if "vision_config" in config and "text_config" in config:
            return "zero-shot-image-classification"
        sees = any(key in config for key in _VISION_INPUTS)
        return "image-feature-extraction" if sees else "feature-extraction"
    return task


def _generating(config: Mapping[str, object]) -> str:
    """The task of a class ...ForConditionalGeneration, from the inputs that its config describes."""
    if any(key in config for key in _VISION_INPUTS):
        return "any-to-any" if "audio_config" in config else "image-text-to-text"
    if any(key in config for key in _SPEECH_INPUTS):
        return "automatic-speech-recognition"
    return "audio-text-to-text" if "audio_config" in config else "text2text-generation"
