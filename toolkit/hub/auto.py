"""Registration with transformers: importing this module makes its Auto classes load exported models.

    import toolkit.hub.auto
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)

The classes are those of this installed package; no code is read from the folder, so `trust_remote_code` is not needed.
"""

from transformers import AutoConfig, AutoModel, AutoProcessor

from toolkit.model.processor import SpeechImageProcessor
from toolkit.model.retrieval import SpeechImageConfig, SpeechImageModel

AutoConfig.register(SpeechImageConfig.model_type, SpeechImageConfig, exist_ok=True)
AutoModel.register(SpeechImageConfig, SpeechImageModel, exist_ok=True)
AutoProcessor.register(SpeechImageConfig, SpeechImageProcessor, exist_ok=True)
