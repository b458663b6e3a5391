"""Write small models with random weights in the layouts of open_clip and transformers, and their outputs.

    pip install torch open_clip_torch transformers safetensors
    python tests/golden/make_clip.py

Writes folders below `clip/`, each below 200 kB: `open_clip` (OpenAI's form: norm before the blocks, sigmoid GELU, class
token), `clipa` (CLIPA's: mean of the patches, fixed positions, tanh GELU), `hugging_face_vit`,
`hugging_face_clip_vision` and `hugging_face_clip`. Each has a `recorded.safetensors` with `images` in [0, 1], the
`outputs` of the image tower, and `gradients`: those of half the sum of the squared outputs with respect to the images.
`clip/versions.json` lists the versions of the packages.
"""

import json
import shutil
from importlib.metadata import version
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    ViTConfig,
    ViTForImageClassification,
)

FOLDER = Path(__file__).resolve().parent / "clip"
SEED = 15
SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 72}
IMAGES = {"image_size": 16, "patch_size": 4}


def disturb(model):
    """Randomizes all weights, with small ones before the first norm, so that its epsilon matters."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            first = any(word in name for word in ("conv1", "patch_embed", "class_embedding", "position"))
            weight.add_(torch.randn_like(weight) * (0.005 if first else 0.1))


def record(folder, answer, mean, std):
    images = torch.rand(2, 3, 16, 16)
    pixels = images.clone().requires_grad_()
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))
    outputs = answer((pixels - mean) / std)
    (gradients,) = torch.autograd.grad(outputs.square().sum() / 2, pixels)
    tensors = {"images": images, "outputs": outputs.detach(), "gradients": gradients}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "recorded.safetensors")


def of_open_clip(name, mean, std, vision, **options):
    vision = {**IMAGES, "layers": 2, "width": 24, "head_width": 12, "mlp_ratio": 3.0, **vision}
    text = {"context_length": 5, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 10, **options, "vision_cfg": vision, "text_cfg": text}
    model = open_clip.CLIP(**config).eval()
    disturb(model)
    folder = FOLDER / name
    folder.mkdir()
    preprocess = {"mean": mean, "std": std, "interpolation": "bicubic", "resize_mode": "shortest"}
    content = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(content, indent=1) + "\n")
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    record(folder, model.encode_image, mean, std)


def of_transformers(name, model, answer, mean, std):
    folder = FOLDER / name
    model.eval()
    disturb(model)
    model.save_pretrained(folder)
    if name == "hugging_face_vit":
        processor = {"do_normalize": True, "image_mean": mean, "image_std": std}
        (folder / "preprocessor_config.json").write_text(json.dumps(processor) + "\n")
    record(folder, answer, mean, std)


def main():
    torch.manual_seed(SEED)
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    openai = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    imagenet = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    of_open_clip("open_clip", *openai, {}, quick_gelu=True)
    clipa = {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True, "pos_embed_type": "sin_cos_2d"}
    clipa |= {"act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-6}}
    of_open_clip("clipa", *imagenet, clipa)

    labels = {0: "cat", 1: "dog", 2: "ship"}
    vit = ViTForImageClassification(ViTConfig(**SIZES, **IMAGES, id2label=labels, label2id={}))
    of_transformers("hugging_face_vit", vit, lambda x: vit(x).logits, [0.4, 0.5, 0.6], [0.3, 0.25, 0.2])
    vision = CLIPVisionModelWithProjection(
        CLIPVisionConfig(**SIZES, **IMAGES, projection_dim=10, hidden_act="gelu")
    )
    of_transformers("hugging_face_clip_vision", vision, lambda x: vision(x).image_embeds, *openai)
    text = SIZES | {"vocab_size": 20, "max_position_embeddings": 5, "bos_token_id": 0, "eos_token_id": 1}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config={**SIZES, **IMAGES}, projection_dim=10))
    features = lambda x: clip.visual_projection(clip.vision_model(x).pooler_output)
    of_transformers("hugging_face_clip", clip, features, *openai)

    packages = ["torch", "open_clip_torch", "transformers", "safetensors"]
    versions = {name: version(name) for name in packages} | {"seed": SEED}
    (FOLDER / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")


if __name__ == "__main__":
    main()
