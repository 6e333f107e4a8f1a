"""vision.pt2: the part of an exported folder before the decoder as one `torch.export` program, pictures to visual tokens.

Takes what the processor gives: u8 frames [B, T, S, S, 3], u8 masks [B, T, S, S] and u8 frames of the motion branch [B, T, S, S, 3] (the
frames again where the branches share them); B is free.  Returns float32 visual tokens [B, 2Q, D].  The mask, resizing and normalisation
are inside, so that no server has to repeat them.  torch and transformers are imported when a function runs: they are no requirement.
"""
from pathlib import Path

from hawk_jax.config import HawkError

NAME = "vision.pt2"


def _load(folder: Path):
    """(module of three arguments, processor settings) of an exported folder, in float32."""
    try:
        import torch
        from transformers import AutoModel
    except ImportError as error:
        raise HawkError(f"vision.pt2 needs torch and transformers ({error}); install them or leave the graph out") from error

    class Graph(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, frames, masks, motion_frames):
            # all pictures at once: chunks would fix the number of clips
            return self.model.visual_tokens(frames, masks, motion_frames, chunk=None)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32, with_decoder=False)
    return Graph(model).eval(), model.processor.pictures


def _example(pictures: dict, clips: int, seed: int):
    import torch
    draw, shape = torch.Generator().manual_seed(seed), (clips, pictures["frames"], pictures["size"], pictures["size"])
    return tuple(torch.randint(0, 256, (*shape, *tail), dtype=torch.uint8, generator=draw) for tail in ((3,), (), (3,)))


def export_vision(folder: Path) -> Path:
    """Writes vision.pt2 into an exported folder and returns its path.  Raises HawkError without torch or transformers."""
    folder = Path(folder)
    graph, pictures = _load(folder)
    import torch
    clips = {0: torch.export.Dim("clips", min=1)}
    with torch.no_grad():
        program = torch.export.export(graph, _example(pictures, 2, 0), dynamic_shapes=(clips, clips, clips))
    _forget(program)
    torch.export.save(program, folder / NAME)
    return folder / NAME


def _forget(program) -> None:
    """Removes what says where and from which lines a graph was traced, and its example: paths of this machine, half of the file."""
    for module in program.graph_module.modules():
        for node in module.graph.nodes if hasattr(module, "graph") else ():
            for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node", "torch_fn"):
                node.meta.pop(key, None)
    program.example_inputs = None


def check_vision(folder: Path) -> float:
    """Largest difference of the reloaded vision.pt2 from the model itself on random pictures, as a share of the largest value."""
    folder = Path(folder)
    graph, pictures = _load(folder)
    import torch
    program, worst = torch.export.load(folder / NAME).module(), 0.0
    for clips in (1, 3):            # the example had two
        example = _example(pictures, clips, clips)
        with torch.no_grad():
            expected, found = graph(*example), program(*example)
        worst = max(worst, float((expected - found).abs().max() / expected.abs().max()))
    return worst
