"""Build any model of the zoo by name, with random weights: ``timm/…``, ``torchvision/…``, ``hf/…``.

An example is one input batch: a tensor, or tensors by parameter name of ``forward``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests import bootstrap

bootstrap.prepare()

import timm  # noqa: E402
import torchvision  # noqa: E402
import transformers  # noqa: E402
from torchvision import models as vision  # noqa: E402
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone  # noqa: E402

transformers.logging.set_verbosity_error()
Example = Tensor | dict[str, Tensor]
Built = tuple[nn.Module, Example]

SMALL_SIZES = (64, 96, 128, 160, 192, 224, 240, 256, 299)
VISION_SIZES = {"inception_v3": 299, "maxvit_t": 224, "mvit_v2_s": 224, "vit_h_14": 70}
DROPOUTS = ({"drop_rate": 0.1, "drop_path_rate": 0.1}, {"drop_rate": 0.1}, {})


@cache
def listed(section: str) -> tuple[str, ...]:
    """The names of one ``[section]`` of zoo.txt, in order, each with its source before a slash."""
    text = (Path(__file__).parent / "zoo.txt").read_text(encoding="utf-8")
    body = re.split(r"^\[(\w+)\]", text, flags=re.MULTILINE)
    names = [
        word for word in body[body.index(section) + 1].split() if not word.islower() or "/" in word
    ]
    return tuple(name if "/" in name else f"hf/{name}" for name in names)


def every_timm_name() -> tuple[str, ...]:
    return tuple(f"timm/{name}" for name in timm.list_models())


def torchvision_names() -> tuple[str, ...]:
    """The classifiers of torchvision, and three segmenters that are only traced."""
    segmenters = ["fcn_resnet50", "deeplabv3_resnet50", "lraspp_mobilenet_v3_large"]
    return tuple(f"torchvision/{name}" for name in vision.list_models(module=vision) + segmenters)


def others() -> tuple[str, ...]:
    """Everything beside timm that the zoo asks for, and the study's forty, each once."""
    listings = (listed("transformers"), torchvision_names(), listed("study"))
    return tuple(dict.fromkeys(name for names in listings for name in names))


def family(name: str) -> str:
    """The module of timm that holds a model, e.g. ``resnet``."""
    return timm.model_entrypoint(name.removeprefix("timm/")).__module__.rpartition(".")[2]


def full_size(name: str, size: int | None = None, **options: Any) -> Built:
    """A model of timm without data on the meta device, for the size that it was made for."""
    size = size or own_size(name)
    with torch.device("meta"):
        return timm_at(name, size, **options), torch.empty(2, 3, size, size)


def real(name: str, size: int | None = None, **options: Any) -> Built:
    """A model with random weights and dropout, and inputs as small as it takes or of ``size``."""
    source, _, bare = name.partition("/")
    if source == "timm":
        size = size or smallest(name)
        model = timm_at(name, size, **_dropout(name), **options)
        built: Built = model, torch.randn(2, 3, size, size)
    else:
        built = _vision(bare) if source == "torchvision" else TRANSFORMERS[bare]()
    enliven(built[0])
    return built


@torch.no_grad()
def enliven(model: nn.Module) -> None:
    """Give weights that start at (almost) zero a value, so that no path is silent."""
    for weight in model.parameters():
        if weight.is_floating_point() and weight.abs().max() < 1e-2:
            weight.add_(torch.randn_like(weight), alpha=0.05)


def timm_at(name: str, size: int, **options: Any) -> nn.Module:
    """A model of timm for square inputs of ``size``."""
    if _is_fixed(name) and size != own_size(name):
        options["img_size"] = size
    return timm.create_model(name.removeprefix("timm/"), **options)


def own_size(name: str) -> int:
    """The side of the images that the published weights were made for."""
    return timm.get_pretrained_cfg(name.removeprefix("timm/")).input_size[-1]


def _is_fixed(name: str) -> bool:
    return bool(timm.get_pretrained_cfg(name.removeprefix("timm/")).fixed_input_size)


@cache
def smallest(name: str) -> int:
    """The smallest size of a square input that the model runs on."""
    return next(size for size in (*SMALL_SIZES, own_size(name)) if accepts(name, size))


def common_size(teacher: str, student: str) -> int | None:
    """A size that both models of timm take, as they are if possible; None where there is none."""
    sizes = (224, own_size(teacher), own_size(student))
    for size in sizes:
        if all(size == own_size(name) or not _is_fixed(name) for name in (teacher, student)) and (
            accepts(teacher, size) and accepts(student, size)
        ):
            return size
    return smallest_common(teacher, student, sizes)


def smallest_common(teacher: str, student: str, sizes: tuple[int, ...] = SMALL_SIZES) -> int | None:
    """The first of ``sizes`` that both models of timm can be built for."""
    both = (size for size in sizes if accepts(teacher, size) and accepts(student, size))
    return next(both, None)


@cache
def accepts(name: str, size: int) -> bool:
    """Whether a model of timm, built for inputs of ``size``, trains on two of them."""
    try:
        with torch.device("meta"), torch.no_grad():
            timm_at(name, size).train()(torch.empty(2, 3, size, size))
    except Exception:
        return False
    return True


@cache
def _dropout(name: str) -> dict[str, float]:
    """The dropout arguments that the model takes."""
    for options in DROPOUTS:
        try:
            with torch.device("meta"):
                timm_at(name, own_size(name), **options)
        except TypeError:
            continue
        return dict(options)
    raise AssertionError(f"{name} cannot be built at all")


def _vision(name: str) -> Built:
    size = VISION_SIZES.get(name, 64)
    if name == "resnet_fpn_backbone":
        model = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5)
        return model, torch.randn(2, 3, size, size)
    options: dict[str, Any] = {"weights": None}
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False  # minutes of truncated normal numbers
    if name.startswith("vit_"):
        options["image_size"] = size
    if name.startswith(("fcn", "deeplab", "lraspp", "retinanet")):
        options["weights_backbone"] = None
    frames = (16,) if name == "mvit_v2_s" else ()
    return vision.get_model(name, **options), torch.randn(2, 3, *frames, size, size)


TEXT = {
    "vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64,
    "pad_token_id": 0, "head_dim": 8,
}  # fmt: skip
IMAGE = {
    "image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 3,
    "num_attention_heads": 4, "intermediate_size": 64, "num_channels": 3, "num_labels": 10,
}  # fmt: skip


def _tokens(length: int = 16) -> dict[str, Tensor]:
    """Two sentences, the second of them padded."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 120, (2, length), generator=generator, device="cpu")
    mask = torch.ones_like(ids)
    ids[1, length - 4 :], mask[1, length - 4 :] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def _text(name: str, **options: Any) -> Callable[[], Built]:
    """A language model; ``options`` None leaves an argument out."""

    def build() -> Built:
        arguments = {key: value for key, value in (TEXT | options).items() if value is not None}
        model_class = getattr(transformers, name)
        return model_class(model_class.config_class(**arguments)), _tokens()

    return build


def _image(name: str, size: int = 32, **options: Any) -> Callable[[], Built]:
    def build() -> Built:
        arguments = {key: value for key, value in (IMAGE | options).items() if value is not None}
        model_class = getattr(transformers, name)
        model = model_class(model_class.config_class(**arguments))
        return model, {"pixel_values": torch.randn(2, 3, size, size)}

    return build


def _encoder_decoder(name: str, **options: Any) -> Callable[[], Built]:
    def build() -> Built:
        model, example = _text(name, **options)()
        return model, {**example, "decoder_input_ids": example["input_ids"][:, :8].clone()}

    return build


def _whisper() -> Built:
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = transformers.WhisperConfig(
        d_model=32, encoder_layers=3, encoder_attention_heads=4, encoder_ffn_dim=64,
        num_mel_bins=16, max_source_positions=20, vocab_size=120, pad_token_id=0,
    )  # fmt: skip
    return WhisperEncoder(config), {"input_features": torch.randn(2, 16, 40)}


def _wav2vec2() -> Built:
    config = transformers.Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
        conv_dim=(16, 16, 16), conv_stride=(5, 2, 2), conv_kernel=(10, 3, 3), vocab_size=40,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, classifier_proj_size=16,
        layerdrop=0.0, apply_spec_augment=False,
    )  # fmt: skip
    model = transformers.Wav2Vec2ForSequenceClassification(config)
    return model, {"input_values": torch.randn(2, 800)}


def _clip() -> Built:
    text = {**TEXT, "eos_token_id": 119}
    image = {key: IMAGE[key] for key in IMAGE if key != "num_labels"}
    model = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=image, projection_dim=16)
    )
    return model, {**_tokens(), "pixel_values": torch.randn(2, 3, 32, 32)}


def _rt_detr() -> Built:
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=16, hidden_sizes=[16, 24, 32, 40], depths=[1, 1, 1, 1],
        out_features=["stage2", "stage3", "stage4"], layer_type="basic",
    )  # fmt: skip
    config = transformers.RTDetrConfig(
        backbone_config=backbone, encoder_hidden_dim=32, encoder_in_channels=[24, 32, 40],
        encoder_ffn_dim=64, encoder_attention_heads=4, d_model=32, num_queries=10,
        decoder_in_channels=[32, 32, 32], decoder_ffn_dim=64, decoder_attention_heads=4,
        decoder_layers=2, num_denoising=0, num_labels=10,
    )  # fmt: skip
    model = transformers.RTDetrForObjectDetection(config)
    return model, {"pixel_values": torch.randn(2, 3, 64, 64)}


def llama_7b() -> Built:
    """Seven billion parameters on the meta device, and two sequences of 128 tokens."""
    config = transformers.LlamaConfig()  # its defaults are Llama-7B
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
        return model, {"input_ids": torch.empty(2, 128, dtype=torch.long)}


_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4}
_STAGES = {"depths": [1, 1, 2, 1], "hidden_sizes": [8, 16, 24, 32]}
TRANSFORMERS: dict[str, Callable[[], Built]] = {
    **{
        f"{name}ForSequenceClassification": _text(f"{name}ForSequenceClassification")
        for name in ("Bert", "DistilBert", "Roberta", "Albert", "Electra", "MPNet", "ModernBert")
    },
    **{
        f"{name}ForCausalLM": _text(f"{name}ForCausalLM")
        for name in ("OPT", "Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Phi3", "Mamba")
    },
    "DebertaV2ForSequenceClassification": _text(
        "DebertaV2ForSequenceClassification", relative_attention=True, pos_att_type=["p2c", "c2p"]
    ),
    "XLNetForSequenceClassification": _text(
        "XLNetForSequenceClassification", max_position_embeddings=None, d_head=8
    ),
    "GPT2LMHeadModel": _text("GPT2LMHeadModel"),
    "T5EncoderModel": _text("T5EncoderModel", **_T5),
    "BertForMaskedLM": _text("BertForMaskedLM"),
    "Gemma3ForCausalLM": _text("Gemma3ForCausalLM", num_hidden_layers=6, sliding_window=8),
    "Qwen3MoeForCausalLM": _text(
        "Qwen3MoeForCausalLM", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
    "T5ForConditionalGeneration": _encoder_decoder("T5ForConditionalGeneration", **_T5),
    "BartForConditionalGeneration": _encoder_decoder(
        "BartForConditionalGeneration", d_model=32, encoder_layers=3, decoder_layers=3,
        encoder_ffn_dim=64, decoder_ffn_dim=64, encoder_attention_heads=4,
        decoder_attention_heads=4,
    ),
    "LongformerForSequenceClassification": _text(
        "LongformerForSequenceClassification", attention_window=[8, 8, 8]
    ),
    "ViTForImageClassification": _image("ViTForImageClassification"),
    "DeiTForImageClassification": _image("DeiTForImageClassification"),
    "BeitForImageClassification": _image("BeitForImageClassification"),
    "Dinov2ForImageClassification": _image("Dinov2ForImageClassification"),
    "CLIPVisionModelWithProjection": _image("CLIPVisionModelWithProjection", projection_dim=16),
    "SwinForImageClassification": _image(
        "SwinForImageClassification", 64, image_size=64, patch_size=4, embed_dim=16, window_size=4,
        depths=[2, 2, 2], num_heads=[2, 4, 4], hidden_size=None, num_hidden_layers=None,
        num_attention_heads=None, intermediate_size=None,
    ),
    "ConvNextV2ForImageClassification": _image(
        "ConvNextV2ForImageClassification", 64, image_size=64, patch_size=4, hidden_size=None,
        num_hidden_layers=None, num_attention_heads=None, intermediate_size=None, **_STAGES,
    ),
    "SegformerForSemanticSegmentation": _image(
        "SegformerForSemanticSegmentation", 64, image_size=None, patch_size=None,
        num_attention_heads=[1, 2, 4, 4], hidden_size=None, num_hidden_layers=None,
        intermediate_size=None, decoder_hidden_size=32, **_STAGES,
    ),
    "WhisperEncoder": _whisper,
    "Wav2Vec2ForSequenceClassification": _wav2vec2,
    "CLIPModel": _clip,
    "RTDetrForObjectDetection": _rt_detr,
}  # fmt: skip


def versions() -> dict[str, str]:
    packages = {"torch": torch, "timm": timm, "torchvision": torchvision}
    packages["transformers"] = transformers
    return {name: package.__version__ for name, package in packages.items()}
