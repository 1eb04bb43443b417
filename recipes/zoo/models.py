"""`recipes.zoo.models:NAME` -> one of the twenty at its published size, seeded weights, no download. `recipes.zoo.tiny` has the same names for a rehearsal."""

from __future__ import annotations

from torch import nn

from gpuopt.models.factory import factory
from recipes.zoo import networks

IMAGE = "pixel_values:float32[N,3,224,224]"


@factory(IMAGE)
def resnet50() -> nn.Module:
    return networks.resnet()


@factory(IMAGE)
def regnet_y_4gf() -> nn.Module:
    return networks.regnet()


@factory(IMAGE)
def convnext_tiny() -> nn.Module:
    return networks.convnext()


@factory(IMAGE)
def mobilenet_v2() -> nn.Module:
    return networks.mobilenet()


@factory(IMAGE)
def efficientnet_b0() -> nn.Module:
    return networks.efficientnet()


@factory(IMAGE)
def vit_base() -> nn.Module:
    return networks.vit()


@factory(IMAGE)
def swin_tiny() -> nn.Module:
    return networks.swin()


@factory("pixel_values:float32[N,3,512,512]")
def segformer_b0() -> nn.Module:
    return networks.segformer()


@factory("pixel_values:float32[N,3,512,672]")
def detr_resnet50() -> nn.Module:
    return networks.detr()


@factory("input_ids:int64[N,77]<49408", IMAGE)
def clip_vit_base() -> nn.Module:
    return networks.clip()


@factory("input_ids:int64[N,S]<30522")
def bert_base() -> nn.Module:
    return networks.bert()


@factory("input_ids:int64[N,S]<128100")
def deberta_v3_base() -> nn.Module:
    return networks.deberta()


@factory("input_ids:int64[N,S]<50257")
def gpt2() -> nn.Module:
    return networks.gpt2()


@factory("input_ids:int64[N,S]<49152")
def smollm2_360m() -> nn.Module:
    return networks.llama()


@factory("input_ids:int64[N,S]<49155")
def granite_moe() -> nn.Module:
    return networks.moe()


@factory("input_ids:int64[N,S]<32128", "decoder_input_ids:int64[N,64]<32128")
def t5_base() -> nn.Module:
    return networks.t5()


@factory("input_features:float32[N,80,3000]", "decoder_input_ids:int64[N,32]<51865")
def whisper_small() -> nn.Module:
    return networks.whisper()


@factory("input_values:float32[N,160000]")
def wav2vec2_base() -> nn.Module:
    return networks.wav2vec2()


@factory("sample:float32[N,4,64,64]", "timestep:int64[N]<1000", "context:float32[N,77,768]")
def diffusion_unet() -> nn.Module:
    return networks.unet()


@factory("input_ids:int64[N,S]<100000")
def lstm_tagger() -> nn.Module:
    return networks.lstm()
