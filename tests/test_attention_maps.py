"""Collected maps against the full softmax of the queries and keys that entered attention, in every family."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models import attention_processor
from diffusers.models.transformers import transformer_flux, transformer_flux2, transformer_qwenimage
from tiny import tiny_editor
from tiny_families import tiny_klein, tiny_klein_kv, tiny_qwen

from mtedit_fast.editors import KleinEditor, KleinKVEditor, QwenEditor, qwen_transformer
from mtedit_fast.editors.speed import compile_transformer
from mtedit_fast.inference_time.attention_maps import AttentionMaps

HEIGHT, WIDTH = 64, 32
PROMPTS = ["Remove red circle", "Add blue square above red circle now please"]
FAMILIES = ["kontext", "klein", "klein_kv", "qwen"]


def editor_of(family):
    if family == "kontext":
        return tiny_editor()
    if family == "klein":
        return KleinEditor(tiny_klein(), max_sequence_length=32)
    if family == "klein_kv":
        return KleinKVEditor(tiny_klein_kv(), max_sequence_length=32)
    return QwenEditor(tiny_qwen(), max_sequence_length=96, condition_area=64**2)


class Case:
    """An edit of two images, ready for its velocity."""

    def __init__(self, family, *, checkpointing=False):
        torch.manual_seed(0)
        self.family, self.editor = family, editor_of(family)
        editor = self.editor
        if checkpointing:
            editor.transformer.enable_gradient_checkpointing()
        images = torch.rand(2, 3, HEIGHT, WIDTH)
        tokens, channels = editor.latent_shape(HEIGHT, WIDTH)
        side = round((HEIGHT * WIDTH / tokens) ** 0.5)
        self.grid = HEIGHT // side, WIDTH // side
        text = editor.encode_text(PROMPTS, images if editor.text_sees_image else None)
        options = {"height": HEIGHT, "width": WIDTH, "guidance_scale": 1.0}
        with torch.no_grad():
            self.condition = editor.condition(editor.encode_image(images), text, **options)
        self.latents = torch.randn(2, tokens, channels)
        self.columns = torch.tensor([[3, 0, 5], [1, 5, 1]])

    def velocity(self, latents=None):
        return self.editor.velocity(self.latents if latents is None else latents, torch.tensor(500.0), self.condition)

    def maps(self, **options):
        return AttentionMaps(self.editor.transformer, self.columns, self.grid, **options)


@pytest.fixture(params=FAMILIES)
def case(request):
    return Case(request.param)


def spy(monkeypatch):
    """Every (query, key, mask) [B, L, heads, D] that the transformers hand to attention."""
    seen = []
    for module in (transformer_flux, transformer_flux2, transformer_qwenimage, qwen_transformer):
        stock = module.dispatch_attention_fn

        def dispatch(query, key, value, attn_mask=None, *, stock=stock, **options):
            seen.append((query.detach().double(), key.detach().double(), attn_mask))
            return stock(query, key, value, attn_mask=attn_mask, **options)

        monkeypatch.setattr(module, "dispatch_attention_fn", dispatch)
    return seen


def full_softmax(query, key, mask):
    """[B, queries, keys] fp64, averaged over heads."""
    logits = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    return logits.softmax(-1).mean(1)


def expected_maps(case, seen):
    """Text comes first among queries and keys, then the edited image."""
    out = []
    tokens = case.latents.shape[1]
    for query, key, mask in seen:
        references = 0 if case.condition.references is None else case.condition.references.shape[1]
        text = query.shape[1] - tokens - references
        attention = full_softmax(query, key, mask)[:, text : text + tokens]
        columns = attention.gather(2, case.columns[:, None].expand(-1, tokens, -1))
        out.append(columns.unflatten(1, case.grid).movedim(-1, 1))
    return out


def test_maps_are_columns_of_the_full_softmax(case, monkeypatch):
    plain = case.velocity()
    seen = spy(monkeypatch)
    with torch.no_grad(), case.maps() as maps:
        velocity = case.velocity()
    expected = expected_maps(case, seen)
    layers = maps.layers()
    assert len(seen) == len(layers) > 1
    for layer, truth in enumerate(expected):
        assert layers[layer].dtype == torch.float32
        torch.testing.assert_close(layers[layer].double(), truth, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(maps.mean().double(), torch.stack(expected).mean(0), rtol=1e-5, atol=1e-7)
    assert maps.mean().std() > 1e-5
    assert torch.equal(velocity, plain)  # the model runs as ever


def test_chosen_layers(case, monkeypatch):
    seen = spy(monkeypatch)
    with torch.no_grad(), case.maps(layers=[1]) as maps:
        case.velocity()
    torch.testing.assert_close(maps.mean().double(), expected_maps(case, seen)[1], rtol=1e-5, atol=1e-7)
    assert list(maps.layers()) == [1]


def test_the_same_columns_for_all_rows(case):
    case.columns = torch.tensor([4, 2])
    with torch.no_grad(), case.maps() as shared:
        case.velocity()
    case.columns = case.columns.expand(2, -1)
    with torch.no_grad(), case.maps() as own:
        case.velocity()
    assert torch.equal(shared.mean(), own.mean())


def weights_like(tensor):
    return torch.linspace(-1, 1, tensor.numel()).view_as(tensor)


def gradient_of(case, **options):
    """Of a weighted sum of the maps, to the latents."""
    latents = case.latents.clone().requires_grad_()
    with case.maps(**options) as maps:
        case.velocity(latents)
        found = maps.mean()
        (gradient,) = torch.autograd.grad((found * weights_like(found)).sum(), latents)
    return found.detach(), gradient


def test_gradients_are_those_through_the_full_softmax(case, monkeypatch):
    """In eager fp32 on both sides; the truth keeps the graph of the queries and keys it saw."""
    _, gradient = gradient_of(case)
    kept = []
    for module in (transformer_flux, transformer_flux2, qwen_transformer):
        stock = module.dispatch_attention_fn

        def dispatch(query, key, value, attn_mask=None, *, stock=stock, **options):
            kept.append((query, key, attn_mask))
            return stock(query, key, value, attn_mask=attn_mask, **options)

        monkeypatch.setattr(module, "dispatch_attention_fn", dispatch)
    latents = case.latents.clone().requires_grad_()
    case.velocity(latents)
    truth = torch.stack(expected_maps(case, kept)).mean(0)
    (expected,) = torch.autograd.grad((truth * weights_like(truth)).sum(), latents)
    assert expected.abs().max() > 0
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_gradient_checkpointing_gives_the_same(case):
    maps, gradient = gradient_of(case)
    again, checkpointed = gradient_of(Case(case.family, checkpointing=True))
    assert torch.equal(maps, again)
    torch.testing.assert_close(checkpointed, gradient, rtol=1e-5, atol=1e-9)


def hooks(model):
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._forward_hooks_with_kwargs)
        for module in model.modules()
    )


def test_nothing_stays_on_the_model(case):
    model = case.editor.transformer
    before = hooks(model), [getattr(module, "processor", None) for module in model.modules()]
    with torch.no_grad(), case.maps() as maps:
        case.velocity()
    first = maps.mean()
    with pytest.raises(RuntimeError, match="inside"), case.maps():
        raise RuntimeError("inside")
    assert (hooks(model), [getattr(module, "processor", None) for module in model.modules()]) == before
    with maps:  # once more: only what this block saw counts
        pass
    with pytest.raises(ValueError, match=r"maps: expected a forward of the model inside the with block"):
        maps.mean()
    with torch.no_grad(), maps:
        case.velocity()
    assert torch.equal(maps.mean(), first)


def test_the_stock_forward_of_qwen(monkeypatch):
    """Complex rotary tables and the text's own mask."""
    transformer = tiny_qwen().transformer
    embeds = torch.randn(2, 7, 16)
    mask = torch.tensor([[True] * 7, [True] * 5 + [False] * 2])
    columns = torch.tensor([0, 4, 6])
    seen = spy(monkeypatch)
    with torch.no_grad(), AttentionMaps(transformer, columns, (2, 4)) as maps:
        transformer(
            hidden_states=torch.randn(2, 12, 16),  # 8 of the image, 4 of a reference
            encoder_hidden_states=embeds,
            encoder_hidden_states_mask=mask,
            timestep=torch.tensor([0.5, 0.5]),
            img_shapes=[[(1, 2, 4), (1, 2, 2)]] * 2,
            return_dict=False,
        )
    keys = torch.cat([mask, torch.ones(2, 12, dtype=torch.bool)], dim=1)[:, None, None]
    truth = torch.stack([full_softmax(query, key, keys)[:, 7:15][..., columns] for query, key, _ in seen]).mean(0)
    torch.testing.assert_close(maps.mean().flatten(2).mT.double(), truth, rtol=1e-5, atol=1e-7)
    assert not maps.mean()[1, 2].any()  # a masked token
    assert maps.mean()[0, 2].all()


def tiny_unet():
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        cross_attention_dim=12,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    for name, parameter in unet.named_parameters():
        if "attn2.to_q" in name or "attn2.to_k" in name:
            parameter.data *= 6
    return unet.eval()


class Recording(attention_processor.AttnProcessor):
    """The stock processor that forms attention scores, which it keeps."""

    def __init__(self):
        self.scores = []

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, **options):
        stock = attn.get_attention_scores

        def keep(*arguments):
            scores = stock(*arguments)
            if encoder_hidden_states is not None:
                self.scores.append(scores.unflatten(0, (-1, attn.heads)).mean(1))
            return scores

        attn.get_attention_scores = keep
        try:
            return super().__call__(attn, hidden_states, encoder_hidden_states, **options)
        finally:
            del attn.get_attention_scores


@pytest.mark.parametrize(("grid", "layers"), [((16, 8), None), ((8, 4), None), ((16, 8), [0])])
@pytest.mark.parametrize("sdpa", [True, False])
def test_a_unets_cross_attention(grid, layers, sdpa):
    """A non-square image; layers of the asked resolution, under both stock processors."""
    unet, states, text = tiny_unet(), torch.randn(2, 4, 16, 8), torch.randn(2, 7, 12)
    columns = torch.tensor([[1, 6, 2], [4, 4, 0]])
    recording = Recording()
    unet.set_attn_processor(recording)
    with torch.no_grad():
        unet(states, 300, text)
    unet.set_attn_processor(attention_processor.AttnProcessor2_0() if sdpa else attention_processor.AttnProcessor())
    with torch.no_grad(), AttentionMaps(unet, columns, grid, layers=layers) as maps:
        unet(states, 300, text)
    # The model lists its blocks down, up, middle and runs them down, middle, up.
    truth = [scores for scores in recording.scores if scores.shape[1] == grid[0] * grid[1]]
    truth = torch.stack(truth if layers is None else truth[:1]).mean(0)
    truth = truth.gather(2, columns[:, None].expand(-1, truth.shape[1], -1))
    torch.testing.assert_close(maps.mean().flatten(2).mT, truth, rtol=1e-5, atol=1e-6)
    assert truth.std() > 1e-3


def test_a_resolution_that_no_layer_has():
    unet = tiny_unet()
    with torch.no_grad(), AttentionMaps(unet, torch.tensor([1]), (5, 5)) as maps:
        unet(torch.randn(1, 4, 16, 16), 300, torch.randn(1, 7, 12))
    with pytest.raises(ValueError, match=r"with layers of 5×5 queries, got none; the layers have \[64, 256\] queries"):
        maps.mean()


def test_a_unets_masked_text_and_fused_projections():
    unet = tiny_unet()
    mask = torch.ones(1, 7, dtype=torch.bool)
    arguments = torch.randn(1, 4, 16, 16), 300, torch.randn(1, 7, 12)
    with (
        pytest.raises(ValueError, match="encoder_attention_mask: expected None"),
        AttentionMaps(unet, torch.tensor([1]), (16, 16)),
    ):
        unet(*arguments, encoder_attention_mask=mask)
    unet.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"model: expected separate projections; call unfuse_qkv_projections\(\)"):
        AttentionMaps(unet, torch.tensor([1]), (16, 16))


def test_compiled_models_are_refused():
    for mode in ("blocks", "whole"):
        editor = tiny_editor()
        compile_transformer(editor, mode)
        with pytest.raises(ValueError, match=r"model: expected one that runs eagerly, got a compiled one"):
            AttentionMaps(editor.transformer, torch.tensor([1]), (4, 4))
    wrapped = torch.compile(tiny_editor().transformer)
    with pytest.raises(ValueError, match=r"got a compiled one"):
        AttentionMaps(wrapped, torch.tensor([1]), (4, 4))


@pytest.mark.parametrize("layers", [[], [-1], [0, 6]])
def test_layers_that_are_not_there(layers):
    with pytest.raises(ValueError, match=r"layers: expected some of 0 … 5, got"):
        AttentionMaps(tiny_editor().transformer, torch.tensor([1]), (4, 4), layers=layers)


def test_a_model_without_text():
    with pytest.raises(TypeError, match=r"model: expected a FLUX.1, FLUX.2 or Qwen-Image transformer .*, got Linear"):
        AttentionMaps(torch.nn.Linear(2, 2), torch.tensor([1]), (4, 4))


@pytest.mark.parametrize(
    ("columns", "grid", "message"),
    [
        ([[1], [2], [3]], None, r"columns: expected \[C\] or \[B, C\] for a forward of 2 rows, got \[3, 1\]"),
        ([16], None, r"columns: expected text tokens 0 … 15, got 16"),
        ([1], (20, 20), r"grid: expected at most \d+ image tokens, got \(20, 20\)"),
    ],
)
def test_columns_and_grids_that_do_not_fit(columns, grid, message):
    case = Case("kontext")
    case.columns, case.grid = torch.tensor(columns), grid or case.grid
    with pytest.raises(ValueError, match=message), case.maps():
        case.velocity()


def test_guidances_other_branch_is_refused():
    editor = QwenEditor(tiny_qwen(), max_sequence_length=96, negative_prompt=" ", condition_area=64**2)
    images = torch.rand(1, 3, 32, 32)
    text = editor.encode_text(PROMPTS[:1], images)
    condition = editor.condition(editor.encode_image(images), text, height=32, width=32, guidance_scale=3.0)
    with (
        pytest.raises(ValueError, match="condition: expected the conditional branch alone, got two"),
        torch.no_grad(),
        AttentionMaps(editor.transformer, torch.tensor([1]), (2, 2)),
    ):
        editor.velocity(torch.randn(1, 4, 16), torch.tensor(500.0), condition)
