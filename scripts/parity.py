"""Compare outputs and input gradients of advxl with timm, open_clip and transformers on equal weights; see scripts/parity.

Import: another program creates a model with random weights and saves it in its usual format, and advxl predicts with it.
Export: advxl trains for a few updates, or imports another program's model, then exports it, and the other program loads
the folder unmodified. Differences are relative to the largest entry. Input gradients are those of the summed cross
entropy, which for embeddings takes their entries as logits.

    scripts/parity [WORD ...]

WORDs select the rows that contain one of them.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable

import open_clip
import timm
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from timm.layers import LayerNorm2d
from torch import nn

ADVXL, WORDS = sys.argv[1], sys.argv[2:]
LOGITS, GRADIENTS = 1e-4, 1e-3
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
OPENAI = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
HALF = (0.5,) * 3, (0.5,) * 3


@dataclass
class Made:
    """A model of the other program, and the arguments of advxl for the same model."""

    answer: Callable  # normalized pixels to outputs
    statistics: tuple  # mean and deviation of the channels
    size: int
    arguments: list
    is_embedding: bool = False


def run(*arguments):
    done = subprocess.run([ADVXL, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"advxl {arguments[0]}: {done.stderr.strip()[:300]}")


def disturb(model):
    """Adds random numbers to the weights: the zero heads and small weights of new models would hide differences."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.02)
    return model.eval()


# Import: models of other programs.


def timm_folder(architecture, folder, **arguments):
    """Saves a timm model in a folder with timm's layout."""
    model = disturb(timm.create_model(architecture, pretrained=False, **arguments))
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    config = {
        "architecture": architecture,
        "num_classes": model.num_classes,
        "model_args": arguments,
        "pretrained_cfg": {"mean": HALF[0], "std": HALF[1]},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return Made(model, HALF, 224, [folder])


class ConvStem(nn.Module):
    """Convolutions of 3 x 3 with norms and GELUs between them, as Singh et al. 2023 publish them."""

    def __init__(self, layers, last=None):
        super().__init__()
        parts = []
        for inputs, outputs, step in layers:
            parts += [nn.Conv2d(inputs, outputs, 3, step, 1), LayerNorm2d(outputs, eps=1e-6), nn.GELU()]
        self.stem = nn.Sequential(*parts, *([nn.Conv2d(outputs, last, 1)] if last else []))

    def forward(self, x):
        return self.stem(x)


def conv_stem_file(architecture, folder):
    """Saves a timm model with a ConvStem as patch embedding, as a single file."""
    model = timm.create_model(architecture, pretrained=False)
    if architecture.startswith("vit"):
        layers = [(3, 48, 2), (48, 96, 2), (96, 192, 2), (192, 384, 2)]
        model.patch_embed.proj = ConvStem(layers, model.embed_dim)
    else:
        width = model.stages[0].blocks[0].conv_dw.in_channels
        model.stem = ConvStem([(3, width // 2, 2), (width // 2, width, 2)])
    disturb(model)
    file = folder.with_suffix(".safetensors")
    save_file(model.state_dict(), file)
    return Made(model, IMAGENET, 224, [file, "--arch", architecture])


SMALL_TEXT = {"context_length": 5, "vocab_size": 20, "width": 64, "heads": 2, "layers": 1}


def open_clip_folder(name, folder, vision={}, **changes):
    """Saves an open_clip model with a small text tower in a folder with open_clip's layout."""
    config = open_clip.get_model_config(name) | {"text_cfg": SMALL_TEXT} | changes
    config["vision_cfg"] = vision if "timm_model_name" in vision else config["vision_cfg"] | vision
    model = disturb(open_clip.CLIP(**config))
    folder.mkdir()
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    content = {"model_cfg": config, "preprocess_cfg": {"mean": OPENAI[0], "std": OPENAI[1]}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    return Made(model.encode_image, OPENAI, 224, [folder], True)


def hugging_face_vit(folder):
    sizes = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
    model = disturb(transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, num_labels=100)))
    model.save_pretrained(folder)
    return Made(lambda x: model(x).logits, HALF, 224, [folder])


def hugging_face_clip(folder):
    model = disturb(transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig()))
    model.save_pretrained(folder)
    return Made(lambda x: model(x).image_embeds, OPENAI, 224, [folder], True)


# Export: models that advxl writes.

RECIPE = """
seed = 1
precision = "f32"
model = {{ {model} }}
data = {{ train = "synthetic:200", test = "synthetic:64" }}
average = {{ decay = 0.9 }}
checkpoint = {{ every_samples = {samples}, keep = 2 }}
log = {{ every_samples = {samples} }}

[[stage]]
name = "train"
batch = 32
phases = [{{ image_size = {size}, samples = {samples} }}]
attack = {{ norm = "linf", epsilon = "8/255", step_size = "8/255", steps = 1, start = "random" }}
objective = {{ kind = "cross_entropy" }}
optimizer = {{ kind = "adamw", weight_decay = 0.05, betas = [0.9, 0.95] }}
learning_rate = {{ peak = 1e-3, warmup_samples = 32, decay = "cosine" }}
augmentation = {{ flip = true }}
"""

MICRO = 'size = "vit_micro", width = 96, depth = 3, heads = 3, hidden = 384, '


def trained(model, folder, size, samples):
    """Trains with advxl for a few updates and returns the run folder."""
    recipe, out = folder.with_suffix(".toml"), folder.with_suffix(".run")
    recipe.write_text(RECIPE.format(model=model, size=size, samples=samples))
    run("train", recipe, "--out", out)
    return out


def to_timm(model, folder):
    run("export", trained(model, folder, 32, 640), "--to", "timm", "--out", folder)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    config = model.pretrained_cfg
    return Made(model, (config["mean"], config["std"]), 32, [folder])


def to_open_clip(source, text, folder):
    """Exports `source` with the text tower of `text` and loads the result in open_clip."""
    run("export", source, "--to", "open-clip", "--text", text, "--out", folder)
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    config = model.visual.preprocess_cfg
    return Made(model.eval().encode_image, (config["mean"], config["std"]), 224, [source], True)


def there_and_back(name, folder, **changes):
    source = folder.with_suffix(".theirs")
    open_clip_folder(name, source, **changes)
    return to_open_clip(source, source, folder)


def trained_embedding(model, folder, size, samples):
    """Trains with labels, for want of captions, and declares the outputs an embedding; returns the model folder."""
    found = trained(model, folder, size, samples) / "model"
    config = json.loads((found / "config.json").read_text())
    config["advxl"]["outputs"] = "embedding"
    config.pop("label_names", None)
    (found / "config.json").write_text(json.dumps(config))
    return found


def ours_to_open_clip(model, folder):
    text = folder.with_suffix(".text")
    open_clip_folder("ViT-B-32", text, embed_dim=12, vision={"layers": 1})  # synthetic images have 12 classes
    return to_open_clip(trained_embedding(model, folder, 224, 64), text, folder)


def features(found):
    """Returns embeddings of transformers, which newer versions wrap."""
    return getattr(found, "pooler_output", found)


def load_transformers(kind, folder):
    """Loads an exported folder as one of transformers' classes; returns its embeddings of normalized pixels."""
    model, problems = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    if problems["missing_keys"] or problems["mismatched_keys"]:
        raise RuntimeError(f"{kind} misses weights: {problems}")
    model.eval()
    if kind == "CLIPModel":
        return lambda x: features(model.get_image_features(pixel_values=x))
    if kind == "CLIPVisionModelWithProjection":
        return lambda x: model(pixel_values=x).image_embeds
    # The class without projection loads all weights but that of the projection.
    projection = load_file(folder / "model.safetensors")["visual_projection.weight"]
    return lambda x: model(pixel_values=x).pooler_output @ projection.T


def to_transformers(kind, source, folder, text=None):
    """Exports `source`, optionally with a text tower, and loads the result in a class of transformers."""
    run("export", source, "--to", "hf-clip", "--out", folder, *(["--text", text] if text else []))
    processor = transformers.CLIPImageProcessor.from_pretrained(folder)
    size = processor.crop_size["height"]
    statistics = tuple(processor.image_mean), tuple(processor.image_std)
    return Made(load_transformers(kind, folder), statistics, size, [source], True)


def transformers_and_back(kind, folder):
    source = folder.with_suffix(".theirs")
    hugging_face_clip(source)
    return to_transformers(kind, source, folder)


def open_clip_to_transformers(kind, name, folder):
    source = folder.with_suffix(".theirs")
    open_clip_folder(name, source)
    return to_transformers(kind, source, folder, source)


def ours_to_transformers(kind, model, folder):
    """Exports a trained model, whose head has a bias."""
    return to_transformers(kind, trained_embedding(model, folder, 32, 640), folder)


TEXTS = Path(__file__).resolve().parent.parent / "tests" / "golden" / "text"
CAPTIONS = ["a photo of a cat", "A Photo Of A DOG, sitting on a bench.", "0123456789 3.14159", "it's he'd we'll", ""]


def texts_to_transformers(name, scratch):
    """Exports a text tower; returns the relative difference of its embeddings of captions in CLIPModel."""
    text, image, folder = TEXTS / name, scratch / "image", scratch / "whole"
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    vision = transformers.CLIPVisionConfig(**sizes, image_size=32, patch_size=8, projection_dim=12)
    transformers.CLIPVisionModelWithProjection(vision).save_pretrained(image)
    run("export", image, "--to", "hf-clip", "--text", text, "--out", folder)
    captions, out = scratch / "captions.txt", scratch / "texts.safetensors"
    captions.write_text("\n".join(CAPTIONS) + "\n")
    run("embed", text, "--captions", captions, "--tokens", "--out", out)
    right = load_file(out)
    processor = transformers.CLIPProcessor.from_pretrained(folder)
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    length = model.config.text_config.max_position_embeddings
    tokens = processor(
        text=CAPTIONS, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )
    end = processor.tokenizer.eos_token_id
    for ours, theirs in zip(right["token_ids"].tolist(), tokens["input_ids"].tolist()):
        if ours[: ours.index(end)] != theirs[: theirs.index(end)]:
            raise RuntimeError(f"token ids {theirs}, expected {ours}")
    with torch.no_grad():
        found = features(model.get_text_features(**tokens))
    return off(found, right["embeddings"])


CLIPA = {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True, "pos_embed_type": "sin_cos_2d"}
CLIPA |= {"act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-6}}
TOKEN, AVERAGE = 'pool = "token", class_token = true, ', 'pool = "average", class_token = true, '
LEARNED = 'position = "learned"'

# (origin, and destination unless it is advxl; name in the table; function that creates the model)
ROWS = [
    ("timm", "ViT-Ti/16, class token", partial(timm_folder, "vit_tiny_patch16_224")),
    ("timm", "ViT-S/16, class token", partial(timm_folder, "vit_small_patch16_224")),
    ("timm", "ViT-S/32, class token", partial(timm_folder, "vit_small_patch32_224")),
    ("timm", "ViT-B/16, class token", partial(timm_folder, "vit_base_patch16_224")),
    ("timm", "ViT-B/16, mean of patches", partial(timm_folder, "vit_base_patch16_224", global_pool="avg")),
    (
        "timm",
        "ViT-B/16, mean, no class token",
        partial(timm_folder, "vit_base_patch16_224", global_pool="avg", class_token=False),
    ),
    ("timm", "ViT-B/16, tanh GELU", partial(timm_folder, "vit_base_patch16_224", act_layer="gelu_tanh")),
    ("timm", "ViT-L/16, mean of patches", partial(timm_folder, "vit_large_patch16_224", global_pool="avg")),
    ("timm", "ViT-B/32 of CLIP, sigmoid GELU", partial(timm_folder, "vit_base_patch32_clip_quickgelu_224")),
    ("timm", "ViT-S/16 + ConvStem", partial(conv_stem_file, "vit_small_patch16_224")),
    ("timm", "ConvNeXt-atto", partial(timm_folder, "convnext_atto")),
    ("timm", "ConvNeXt-T", partial(timm_folder, "convnext_tiny")),
    ("timm", "ConvNeXt-T + ConvStem", partial(conv_stem_file, "convnext_tiny")),
    ("open_clip", "ViT-B-32-quickgelu", partial(open_clip_folder, "ViT-B-32-quickgelu")),
    ("open_clip", "ViT-B-16", partial(open_clip_folder, "ViT-B-16")),
    ("open_clip", "ViT-B-16 in CLIPA's form", partial(open_clip_folder, "ViT-B-16", vision=CLIPA)),
    (
        "open_clip",
        "timm's ViT-Ti/16 with a projection",
        partial(open_clip_folder, "ViT-B-16", vision={"timm_model_name": "vit_tiny_patch16_224", "timm_pool": ""}),
    ),
    (
        "open_clip",
        "timm's ConvNeXt-atto with a projection",
        partial(open_clip_folder, "ViT-B-16", vision={"timm_model_name": "convnext_atto", "timm_pool": ""}),
    ),
    ("transformers", "ViT-S/16", hugging_face_vit),
    ("transformers", "CLIP ViT-B/32 with projection", hugging_face_clip),
    (
        "advxl to timm",
        "average, fixed positions",
        partial(to_timm, MICRO + 'pool = "average", class_token = false, position = "sincos2d"'),
    ),
    ("advxl to timm", "average, class token, learned positions", partial(to_timm, MICRO + AVERAGE + LEARNED)),
    ("advxl to timm", "class token, learned positions", partial(to_timm, MICRO + TOKEN + LEARNED)),
    ("advxl to timm", "class token, tanh GELU", partial(to_timm, MICRO + TOKEN + LEARNED + ', gelu = "tanh"')),
    (
        "advxl to timm",
        "class token, norm before the blocks",
        partial(to_timm, MICRO + TOKEN + LEARNED + ", pre_norm = true"),
    ),
    (
        "advxl to timm",
        "the same, sigmoid GELU, epsilon 1e-5",
        partial(to_timm, MICRO + TOKEN + LEARNED + ', pre_norm = true, gelu = "quick", norm_eps = 1e-5'),
    ),
    ("advxl to timm", "ConvNeXt-atto, patches of 1", partial(to_timm, 'size = "convnext_atto", patch = 1')),
    ("advxl to open_clip", "ViT-B-32-quickgelu, read from there", partial(there_and_back, "ViT-B-32-quickgelu")),
    (
        "advxl to open_clip",
        "ViT-B-16 in CLIPA's form, read from there",
        partial(there_and_back, "ViT-B-16", vision=CLIPA),
    ),
    (
        "advxl to open_clip",
        "ViT-Ti/16, average, as timm's",
        partial(ours_to_open_clip, 'size = "vit_ti16", ' + AVERAGE + LEARNED),
    ),
    (
        "advxl to open_clip",
        "ViT-Ti/16, class token, fixed positions, as timm's",
        partial(ours_to_open_clip, 'size = "vit_ti16", ' + TOKEN + 'position = "sincos2d"'),
    ),
    (
        "advxl to open_clip",
        "ConvNeXt-atto, as timm's",
        partial(ours_to_open_clip, 'size = "convnext_atto"'),
    ),
    *(
        ("advxl to transformers", f"{kind}: CLIP ViT-B/32, read from there", partial(transformers_and_back, kind))
        for kind in ("CLIPVisionModelWithProjection", "CLIPVisionModel")
    ),
    *(
        (
            "advxl to transformers",
            f"{kind}: open_clip's ViT-B-32-quickgelu with text",
            partial(open_clip_to_transformers, kind, "ViT-B-32-quickgelu"),
        )
        for kind in ("CLIPModel", "CLIPVisionModelWithProjection", "CLIPVisionModel")
    ),
    *(
        (
            "advxl to transformers",
            f"CLIPVisionModelWithProjection: {name}, bias of the head folded",
            partial(ours_to_transformers, "CLIPVisionModelWithProjection", MICRO + TOKEN + "pre_norm = true, " + more),
        )
        for name, more in (
            ("learned positions, sigmoid GELU", LEARNED + ', gelu = "quick"'),
            ("fixed positions, tanh GELU", 'position = "sincos2d", gelu = "tanh"'),
        )
    ),
]

# Text towers of `tests/golden/text`, exported with their tokenizers to CLIPModel.
TEXT_ROWS = ["hf_quick", "hf_gelu", "open_clip", "custom"]


def of_other_program(made, images, labels):
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in made.statistics)
    pixels = images.clone().requires_grad_()
    outputs = made.answer((pixels - mean) / std)
    (gradient,) = torch.autograd.grad(F.cross_entropy(outputs, labels, reduction="sum"), pixels)
    return outputs.detach(), gradient


def of_advxl(made, images, labels, scratch):
    data, out = scratch / "images.safetensors", scratch / "out.safetensors"
    save_file({"images": images.contiguous(), "labels": labels}, data)
    predict = ["predict", *made.arguments, "--data", f"tensors:{data}", "--out", out]
    if not made.is_embedding:
        run(*predict, "--gradient")
        found = load_file(out)
        return found["logits"], found["gradients"]
    run(*predict)
    outputs, again = load_file(out)["logits"], scratch / "again"
    # advxl computes gradients for class logits only, so the entries of an embedding are declared as such.
    run("export", *made.arguments, "--to", "timm", "--out", again)
    config = json.loads((again / "config.json").read_text())
    config["advxl"]["outputs"] = "logits"
    (again / "config.json").write_text(json.dumps(config))
    run("predict", again, "--data", f"tensors:{data}", "--gradient", "--out", out)
    return outputs, load_file(out)["gradients"]


def off(found, right):
    return ((found - right).abs().max() / right.abs().max()).item()


def compare(make, seed):
    """Returns the image size and the relative differences of outputs and gradients."""
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        torch.manual_seed(seed)
        made = make(scratch / "model")
        generator = torch.Generator().manual_seed(seed)
        images = torch.rand(4, 3, made.size, made.size, generator=generator)
        labels = torch.randint(0, 10, (4,), generator=generator)
        right = of_other_program(made, images, labels)
        found = of_advxl(made, images, labels, scratch)
    return made.size, *(off(a, b) for a, b in zip(found, right))


def main():
    modules = timm, open_clip, transformers, torch
    print(", ".join(f"{module.__name__} {module.__version__}" for module in modules) + "\n")
    print("| from | model | image | outputs off by | input gradients off by |\n|---|---|---|---|---|")
    failed = False
    for number, (origin, name, make) in enumerate(ROWS):
        line = f"{origin} {name}"
        if WORDS and not any(word in line for word in WORDS):
            continue
        try:
            size, outputs, gradients = compare(make, number)
        except RuntimeError as error:
            print(f"{line}: {error}", file=sys.stderr)
            failed = True
            continue
        failed |= not (outputs <= LOGITS and gradients <= GRADIENTS)
        print(f"| {origin} | {name} | {size} | {outputs:.1e} | {gradients:.1e} |", flush=True)
    for number, name in enumerate(TEXT_ROWS):
        line = f"advxl to transformers CLIPModel: captions, text tower {name}"
        if WORDS and not any(word in line for word in WORDS):
            continue
        torch.manual_seed(number)
        try:
            with tempfile.TemporaryDirectory() as scratch:
                found = texts_to_transformers(name, Path(scratch))
        except RuntimeError as error:
            print(f"{line}: {error}", file=sys.stderr)
            failed = True
            continue
        failed |= not found <= LOGITS
        print(f"| advxl to transformers | CLIPModel: captions, text tower `{name}` | | {found:.1e} | |", flush=True)
    if failed:
        sys.exit(f"some rows failed or differ by more than {LOGITS} in outputs or {GRADIENTS} in gradients")


if __name__ == "__main__":
    main()
