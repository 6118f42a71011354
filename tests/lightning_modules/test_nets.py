"""The MSDM networks against closed forms, torch and diffusers."""

import pytest
import torch
from diffusers.models.attention_processor import Attention as DiffusersAttention
from diffusers.models.embeddings import get_timestep_embedding
from torch import nn

from lightning_modules.nets.blocks import ResBlock
from lightning_modules.nets.msdm_unet import Attention, AttentionPooling, MSDMUNet, timestep_embedding
from lightning_modules.nets.msdm_vae import MSDMVAE, MSDMVQVAE, VectorQuantizer
from medsynth.errors import UserError

TINY_UNET = {
    "in_channels": 4,
    "widths": (8, 8, 16, 24),
    "res_blocks": 1,
    "heads": 2,
    "time_dim": 32,
    "text_dim": 12,
    "norm_groups": 4,
    "pool_head_dim": 8,
}
TINY_VAE = {"widths": (4, 8, 8, 12), "norm_groups": 2}


def perturbed(net: nn.Module) -> nn.Module:
    """The net in eval mode with all its weights moved off their initial values, the zeros above all."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net.eval()


def unet(**changes) -> MSDMUNet:
    torch.manual_seed(0)
    return perturbed(MSDMUNet(**TINY_UNET | changes))


def unet_inputs(batch: int = 3, height: int = 8, width: int = 12) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    mask = torch.ones(batch, 6, dtype=torch.bool)
    mask[0, 4:] = False
    mask[1:2, 1:] = False
    return {
        "x_BCHW": torch.randn(batch, 4, height, width),
        "t_B": torch.randint(0, 1000, (batch,)),
        "text_BLD": torch.randn(batch, 6, 12),
        "text_mask_BL": mask,
        "self_cond_BCHW": torch.randn(batch, 4, height, width),
    }


def count(build, **options) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build(**options).parameters())


def without_gradient(net: nn.Module) -> list[str]:
    return [name for name, p in net.named_parameters() if p.grad is None or p.grad.abs().max() == 0]


def test_full_size_has_the_parameters_of_the_paper():
    assert count(MSDMUNet) == pytest.approx(326e6, rel=0.03)
    # All of MSDM is 463 M, of which CLIP ViT-L/14's text encoder is 123 M.
    assert count(MSDMUNet) + count(MSDMVAE) + 123e6 == pytest.approx(463e6, rel=0.01)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 8), (4, 12)])
def test_unet_shapes_and_zero_output_before_training(height, width):
    net = MSDMUNet(**TINY_UNET, deep_supervision=2)
    out, deep = net(**unet_inputs(2, height, width))
    assert out.shape == (2, 4, height, width)
    assert [tuple(d.shape) for d in deep] == [(2, 4, height // 2, width // 2), (2, 4, height // 4, width // 4)]
    assert all((o == 0).all() for o in [out, *deep])


def test_unet_learned_variance_doubles_the_channels_of_the_output_only():
    out, deep = unet(learned_variance=True, deep_supervision=1)(**unet_inputs(2))
    assert out.shape == (2, 8, 8, 12)
    assert deep[0].shape == (2, 4, 4, 6)


def test_adaptive_norm_is_a_plain_group_norm_before_training():
    norm = MSDMUNet(**TINY_UNET).middle.cross.attention_norm
    x, emb = torch.randn(2, 24, 4, 4), torch.randn(2, 32)
    torch.testing.assert_close(norm(x, emb), nn.functional.group_norm(x, 4))


def test_res_block_second_half_is_the_identity_before_training():
    block = ResBlock(4, 8, norm_groups=2, embedding_dim=6)
    x, emb = torch.randn(2, 4, 5, 5), torch.randn(2, 6)
    offset = block.embed[1](nn.functional.silu(emb))[:, :, None, None]
    torch.testing.assert_close(block(x, emb), block.first(x) + offset, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widths": (8, 8, 18)}, "norm_groups=4 does not divide width 18"),
        ({"norm_groups": 0}, "norm_groups=0"),
        ({"res_blocks": 0}, "res_blocks=0"),
        ({"heads": 3}, "heads=3 does not divide width 8"),
        ({"time_dim": 12}, "time_dim=12"),
        ({"deep_supervision": 3}, "from 0 to 2"),
        ({"widths": (8,)}, "at least one level"),
    ],
)
def test_unet_refuses_options_that_do_not_fit(changes, message):
    with pytest.raises(UserError, match=message):
        MSDMUNet(**TINY_UNET | changes)


@pytest.mark.parametrize(("height", "width"), [(6, 8), (8, 7)])
def test_unet_refuses_sizes_it_cannot_halve(height, width):
    with pytest.raises(UserError, match=f"{height}x{width}.*multiples of 4"):
        unet()(**unet_inputs(1, height, width))


def test_padding_tokens_have_no_influence():
    net, inputs = unet(deep_supervision=1), unet_inputs()
    other = inputs | {"text_BLD": torch.where(inputs["text_mask_BL"][..., None], inputs["text_BLD"], 50.0)}
    out, (deep,) = net(**inputs)
    out_other, (deep_other,) = net(**other)
    torch.testing.assert_close(out, out_other)
    torch.testing.assert_close(deep, deep_other)
    # The first row's visible tokens alone are the same prompt.
    first = {name: value[:1] for name, value in inputs.items()} | {"text_mask_BL": None}
    torch.testing.assert_close(net(**first | {"text_BLD": inputs["text_BLD"][:1, :4]})[0], out[:1])


def test_no_mask_shows_every_token():
    net, inputs = unet(), unet_inputs()
    shown = net(**inputs | {"text_mask_BL": torch.ones(3, 6, dtype=torch.bool)})[0]
    torch.testing.assert_close(net(**inputs | {"text_mask_BL": None})[0], shown)
    assert (net(**inputs)[0] - shown)[0].abs().max() > 1e-4


@pytest.mark.parametrize("name", ["x_BCHW", "t_B", "text_BLD", "self_cond_BCHW"])
def test_every_input_has_influence_on_its_own_row_only(name):
    net, inputs = unet(), unet_inputs()
    changed = inputs[name].clone()
    changed[1] = changed[0]
    difference = (net(**inputs)[0] - net(**inputs | {name: changed})[0]).abs().amax(dim=(1, 2, 3))
    assert difference[1] > 1e-4
    assert difference[[0, 2]].max() < 1e-5


def test_decoder_blocks_take_the_encoder_outputs_last_in_first_out():
    net, sent, taken = unet(res_blocks=2), [], []
    encoder = [block for level in net.encoder for block in [*level.blocks, level.down] if block is not None]
    for module in [net.in_conv, *encoder]:
        module.register_forward_hook(lambda module, inputs, output: sent.append(output))
    for block in [block for level in net.decoder for block in level.blocks]:
        block.register_forward_pre_hook(lambda module, inputs: taken.append(inputs[0]))
    net(**unet_inputs())
    assert len(sent) == len(taken) == 9
    for skip, features in zip(reversed(sent), taken, strict=True):
        torch.testing.assert_close(features[:, -skip.shape[1] :], skip, rtol=0, atol=0)


def test_dropout_acts_in_residual_blocks_and_after_cross_attention():
    torch.manual_seed(0)
    res, attention = ResBlock(8, 8, norm_groups=4, dropout=0.5), Attention(8, 8, heads=2, head_dim=4, dropout=0.5)
    x, tokens = torch.randn(2, 8, 4, 4), torch.randn(2, 6, 8)
    assert not torch.equal(res(x), res(x))
    assert not torch.equal(attention(tokens, tokens), attention(tokens, tokens))
    rates = {name: m.p for name, m in MSDMUNet(**TINY_UNET, dropout=0.3).named_modules() if isinstance(m, nn.Dropout)}
    assert all(rate == (0 if name.startswith("text_pool") else 0.3) for name, rate in rates.items())


@pytest.mark.parametrize("silenced", ["text_pool", "cross"])
def test_text_reaches_the_image_by_pooling_and_by_cross_attention(silenced):
    net, inputs = unet(), unet_inputs()
    for name, module in net.named_modules():
        if isinstance(module, Attention) and silenced in name:
            nn.init.zeros_(module.to_out[0].weight)
    changed = net(**inputs | {"text_BLD": -inputs["text_BLD"]})[0]
    assert (changed - net(**inputs)[0]).abs().max() > 1e-4


def test_missing_self_condition_is_zeros_and_an_unexpected_one_is_refused():
    net, inputs = unet(), unet_inputs()
    zeros = inputs | {"self_cond_BCHW": torch.zeros(3, 4, 8, 12)}
    torch.testing.assert_close(net(**inputs | {"self_cond_BCHW": None})[0], net(**zeros)[0], rtol=0, atol=0)
    plain = unet(self_conditioning=False)
    assert plain(**inputs | {"self_cond_BCHW": None})[0].shape == (3, 4, 8, 12)
    with pytest.raises(ValueError, match="self_conditioning=False"):
        plain(**inputs)


def test_each_row_is_the_same_alone_and_in_a_batch():
    net, inputs = unet(), unet_inputs()
    together = net(**inputs)[0]
    for i in range(3):
        alone = net(**{name: value[i : i + 1] for name, value in inputs.items()})[0]
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-5)


def test_channels_last_and_bfloat16_give_the_same_prediction():
    net, inputs = unet(), unet_inputs()
    expected = net(**inputs)[0]
    pictures = {name: inputs[name].to(memory_format=torch.channels_last) for name in ("x_BCHW", "self_cond_BCHW")}
    out = net.to(memory_format=torch.channels_last)(**inputs | pictures)[0]
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert out.is_contiguous(memory_format=torch.channels_last)
    halves = {name: value.bfloat16() if value.is_floating_point() else value for name, value in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16):
        mixed = net(**inputs)[0]
    for reduced in (mixed, net.bfloat16()(**halves)[0]):
        assert reduced.dtype == torch.bfloat16
        assert (reduced.float() - expected).norm() / expected.norm() < 0.05


def test_unet_gradients_reach_every_parameter():
    net = unet(deep_supervision=2).train()
    out, deep = net(**unet_inputs())
    sum(o.square().sum() for o in [out, *deep]).backward()
    assert without_gradient(net) == []


def test_attention_is_diffusers_attention():
    torch.manual_seed(0)
    ours = Attention(query_dim=16, context_dim=12, heads=2, head_dim=8)
    reference = DiffusersAttention(16, cross_attention_dim=12, heads=2, dim_head=8, bias=False, out_bias=False)
    reference.load_state_dict(ours.state_dict())
    x, context = torch.randn(2, 5, 16), torch.randn(2, 4, 12)
    mask = torch.tensor([[True, True, False, False], [True, True, True, True]])
    # diffusers adds its mask, one row a head.
    additive = torch.zeros(2, 1, 4).masked_fill(~mask[:, None], -torch.inf).repeat_interleave(2, dim=0)
    torch.testing.assert_close(ours(x, context), reference(x, context), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(x, context, mask), reference(x, context, additive), rtol=1e-5, atol=1e-5)


def test_cross_attention_block_treats_every_position_alike():
    block = unet().middle.cross
    x, emb, context, order = torch.randn(2, 24, 3, 4), torch.randn(2, 32), torch.randn(2, 5, 32), torch.randperm(12)

    def shuffled(picture):
        return picture.flatten(2)[:, :, order].unflatten(2, (3, 4))

    torch.testing.assert_close(block(shuffled(x), emb, context, None), shuffled(block(x, emb, context, None)))


def test_pooling_queries_with_the_mean_of_the_visible_tokens():
    torch.manual_seed(0)
    pool = AttentionPooling(16, heads=2, head_dim=4)
    context = torch.randn(1, 5, 16)
    mask = torch.tensor([[True, True, True, False, False]])
    seen = context[:, :3]
    expected = pool.attention(seen.mean(dim=1, keepdim=True), seen)[:, 0]
    torch.testing.assert_close(pool(context, mask), expected)
    torch.testing.assert_close(pool(seen), expected)


def test_timestep_embedding_is_diffusers_embedding():
    steps = torch.tensor([0, 1, 17, 999])
    expected = get_timestep_embedding(steps, 32, flip_sin_to_cos=False, downscale_freq_shift=1)
    torch.testing.assert_close(timestep_embedding(steps, 32), expected)


@pytest.mark.parametrize(("height", "width"), [(16, 16), (24, 8)])
def test_vae_shapes(height, width):
    vae = perturbed(MSDMVAE(**TINY_VAE, deep_supervision=2))
    mean, logvar = vae.encode(torch.rand(2, 3, height, width) * 2 - 1)
    assert mean.shape == logvar.shape == (2, 8, height // 8, width // 8)
    pictures = vae.decode_all(mean)
    assert [tuple(p.shape) for p in pictures] == [(2, 3, height // f, width // f) for f in (1, 2, 4)]
    torch.testing.assert_close(vae.decode(mean), pictures[0], rtol=0, atol=0)


def test_vae_factor_follows_the_widths():
    vae = MSDMVAE(widths=(4, 8), norm_groups=2, deep_supervision=0)
    assert vae.downsampling_factor == 2
    assert vae.encode(torch.zeros(1, 3, 6, 8))[0].shape == (1, 8, 3, 4)
    assert (vae.decode(torch.randn(1, 8, 3, 4)) == 0).all()


def test_vae_log_variance_is_clamped():
    vae = MSDMVAE(**TINY_VAE)
    nn.init.constant_(vae.to_moments[1].bias, 1000.0)
    assert (vae.encode(torch.zeros(1, 3, 8, 8))[1] == 20).all()
    nn.init.constant_(vae.to_moments[1].bias, -1000.0)
    assert (vae.encode(torch.zeros(1, 3, 8, 8))[1] == -30).all()


@pytest.mark.parametrize("build", [MSDMVAE, MSDMVQVAE])
def test_autoencoders_refuse_what_does_not_fit(build):
    with pytest.raises(UserError, match="norm_groups=3 does not divide width 4"):
        build(**TINY_VAE | {"norm_groups": 3})
    with pytest.raises(UserError, match="from 0 to 3"):
        build(**TINY_VAE, deep_supervision=4)
    with pytest.raises(UserError, match="8x12.*multiples of 8"):
        build(**TINY_VAE).encode(torch.zeros(1, 3, 8, 12))


def test_vae_gradients_reach_every_parameter():
    torch.manual_seed(0)
    vae = perturbed(MSDMVAE(**TINY_VAE))
    mean, logvar = vae.encode(torch.rand(2, 3, 16, 16))
    z = mean + torch.exp(logvar / 2) * torch.randn_like(mean)
    sum(picture.square().sum() for picture in vae.decode_all(z)).backward()
    assert without_gradient(vae) == []


def test_quantizer_takes_the_nearest_code():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(codes=200, channels=4)
    assert quantizer.codebook.weight.abs().max() <= 1 / 200
    z = torch.randn(2, 4, 16, 12) / 200
    z_q, _, indices = quantizer(z)
    assert indices.shape == (2, 16, 12)
    assert indices.dtype == torch.int64
    torch.testing.assert_close(z_q, quantizer.codebook(indices).permute(0, 3, 1, 2))
    distances = torch.cdist(z.permute(0, 2, 3, 1).flatten(0, 2).double(), quantizer.codebook.weight.double())
    chosen = distances.gather(1, indices.view(-1, 1))[:, 0]
    torch.testing.assert_close(chosen, distances.amin(dim=1), rtol=1e-5, atol=0)


def test_quantizer_loss_and_its_gradients_in_closed_form():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(codes=7, channels=2, beta=0.25)
    z = torch.randn(3, 2, 4, 4, requires_grad=True)
    _, loss, indices = quantizer(z)
    loss.backward()
    distance = quantizer.codebook.weight[indices].permute(0, 3, 1, 2) - z
    torch.testing.assert_close(loss, 1.25 * distance.square().mean())
    # Only the commitment term moves z, only the codebook term the codes.
    torch.testing.assert_close(z.grad, -0.25 * 2 * distance / z.numel())
    pull = torch.zeros(7, 2).index_add(
        0, indices.flatten(), (2 * distance / z.numel()).permute(0, 2, 3, 1).flatten(0, 2)
    )
    torch.testing.assert_close(quantizer.codebook.weight.grad, pull)


def test_quantizer_passes_the_gradient_straight_through():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(codes=7, channels=2)
    z, upstream = torch.randn(3, 2, 4, 4, requires_grad=True), torch.randn(3, 2, 4, 4)
    quantizer(z)[0].backward(upstream)
    torch.testing.assert_close(z.grad, upstream, rtol=0, atol=0)
    assert quantizer.codebook.weight.grad is None


def test_quantizer_keeps_full_precision_under_autocast():
    torch.manual_seed(0)
    quantizer, z = VectorQuantizer(codes=200, channels=4), torch.randn(2, 4, 8, 8) / 200
    expected = quantizer(z)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = quantizer(z)
    for a, b in zip(mixed, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_vqvae_quantises_what_it_decodes():
    torch.manual_seed(0)
    vae = perturbed(MSDMVQVAE(**TINY_VAE, codes=16))
    z = vae.encode(torch.rand(2, 3, 16, 24))
    assert z.shape == (2, 4, 2, 3)
    z_q, _, indices = vae.quantize(z)
    assert indices.shape == (2, 2, 3)
    pictures = vae.decode_all(z)
    assert [tuple(p.shape) for p in pictures] == [(2, 3, 16, 24), (2, 3, 8, 12)]
    torch.testing.assert_close(pictures, vae.decoder(z_q))
    torch.testing.assert_close(vae.decode(z), pictures[0], rtol=0, atol=0)


def test_vqvae_gradients_reach_every_parameter():
    torch.manual_seed(0)
    vae = perturbed(MSDMVQVAE(**TINY_VAE, codes=2))
    z_q, loss, _ = vae.quantize(vae.encode(torch.rand(2, 3, 16, 16)))
    (loss + sum(picture.square().sum() for picture in vae.decoder(z_q))).backward()
    assert without_gradient(vae) == []
