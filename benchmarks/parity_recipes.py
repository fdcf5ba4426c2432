"""The recipes of benchmarks/parity.py. (method, idea, recipe).

Models are called BASE, A, B and C; KIN and KIN2 are fine-tunes that moved far and alike; FAR is none.
"""

from __future__ import annotations

import textwrap

_RECIPES = [
    (
        "linear",
        "three inputs",
        """
        models:
          - {model: A, parameters: {weight: 1.0}}
          - {model: B, parameters: {weight: 0.3}}
          - {model: C, parameters: {weight: 0.5}}
        """,
    ),
    (
        "linear",
        "gradients, filters, fall through to top",
        """
        models:
          - model: A
            parameters:
              weight:
                - {filter: self_attn, value: [0.1, 0.9]}
                - {filter: mlp.down, value: [1, 0, 1, 0.5]}
          - model: B
            parameters: {weight: [0.2, 0.7, 0.4]}
          - model: C
            parameters:
              weight:
                - {filter: norm, value: 0.9}
                - {filter: "*", value: 0.25}
        parameters:
          weight: [0.5, 0.75]
        """,
    ),
    (
        "linear",
        "normalize: false, a negative weight",
        """
        models:
          - {model: A, parameters: {weight: 0.9}}
          - {model: B, parameters: {weight: [0.4, -0.3]}}
          - {model: C, parameters: {weight: -0.2}}
        parameters: {normalize: false}
        """,
    ),
    (
        "linear",
        "slices of shifted layers, one level each",
        """
        slices:
          - sources:
              - {model: A, layer_range: [0, 4], parameters: {weight: [1, 0]}}
              - {model: B, layer_range: [1, 5]}
            parameters: {weight: [0, 1, 0.5]}
          - sources:
              - {model: C, layer_range: [2, 6]}
              - {model: A, layer_range: [0, 4]}
          - sources:
              - {model: B, layer_range: [5, 6], parameters: {weight: [0.2, 0.4]}}
              - {model: C, layer_range: [5, 6]}
        parameters:
          weight:
            - {filter: q_proj, value: 0.8}
            - {value: 0.6}
        """,
    ),
    (
        "linear",
        "filters by number: input names, output names",
        """
        slices:
          - sources:
              - {model: A, layer_range: [1, 4]}
              - model: B
                layer_range: [2, 5]
                parameters:
                  weight:
                    - {filter: layers.3, value: 0.9}
                    - {filter: layers.1, value: 0.1}
          - sources:
              - {model: A, layer_range: [0, 3]}
              - {model: B, layer_range: [3, 6], parameters: {weight: 0.2}}
        parameters:
          weight:
            - {filter: layers.3, value: 0.7}
            - {filter: layers.0, value: 0.6}
            - {value: 0.4}
          normalize:
            - {filter: layers.4, value: false}
            - {value: true}
        """,
    ),
    (
        "slerp",
        "one t",
        """
        models: [{model: A}, {model: B}]
        base_model: A
        parameters: {t: 0.35}
        """,
    ),
    (
        "slerp",
        "gradients, filters; the base listed second",
        """
        slices:
          - sources:
              - {model: A, layer_range: [0, 6]}
              - {model: FAR, layer_range: [0, 6]}
        base_model: FAR
        parameters:
          t:
            - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
            - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
            - {value: 0.5}
        """,
    ),
    (
        "slerp",
        "a gradient alone: embeddings and head at its start",
        """
        models: [{model: A}, {model: FAR}]
        base_model: A
        parameters: {t: [0.2, 0.9, 0.4]}
        """,
    ),
    (
        "slerp",
        "slices, t of a slice, then of the top",
        """
        slices:
          - sources:
              - {model: A, layer_range: [0, 3]}
              - {model: FAR, layer_range: [0, 3]}
            parameters:
              t:
                - {filter: o_proj, value: [0.1, 0.8]}
          - sources:
              - {model: A, layer_range: [1, 6]}
              - {model: FAR, layer_range: [1, 6]}
        base_model: A
        parameters: {t: [0.3, 0.6]}
        """,
    ),
    (
        "task_arithmetic",
        "addition and subtraction, lambda",
        """
        models:
          - {model: A, parameters: {weight: 0.7}}
          - {model: B, parameters: {weight: -0.5}}
          - {model: C, parameters: {weight: 0.4}}
        base_model: BASE
        parameters: {lambda: 0.8}
        """,
    ),
    (
        "task_arithmetic",
        "gradients, filters, normalize: true",
        """
        models:
          - model: A
            parameters:
              weight:
                - {filter: mlp, value: [0, 0.5, 1]}
                - {filter: embed_tokens, value: 0.3}
                - {filter: lm_head, value: [0.6, 0.1]}
                - {value: 0.2}
          - {model: B, parameters: {weight: [1, 0.2]}}
          - model: C
            parameters:
              weight:
                - {filter: self_attn, value: 0.9}
        base_model: BASE
        parameters:
          weight: 0.35
          normalize: true
          int8_mask: true
        """,
    ),
    (
        "task_arithmetic",
        "the base among the models, without a weight",
        """
        models:
          - {model: BASE}
          - {model: A, parameters: {weight: 0.6}}
          - {model: B, parameters: {weight: 0.6}}
        base_model: BASE
        """,
    ),
    (
        "task_arithmetic",
        "slices, base below, shifted layers",
        """
        slices:
          - sources:
              - {model: A, layer_range: [0, 3], parameters: {weight: [0.2, 0.8]}}
              - {model: BASE, layer_range: [0, 3]}
              - {model: B, layer_range: [0, 3], parameters: {weight: 0.5}}
          - sources:
              - {model: BASE, layer_range: [2, 6]}
              - {model: C, layer_range: [2, 6], parameters: {weight: [1, 0.1]}}
        base_model: BASE
        """,
    ),
    (
        "ties",
        "three inputs",
        """
        models:
          - {model: A, parameters: {weight: 0.5, density: 0.5}}
          - {model: B, parameters: {weight: 0.3, density: 0.3}}
          - {model: C, parameters: {weight: 0.4, density: 0.7}}
        base_model: BASE
        """,
    ),
    (
        "ties",
        "gradients, filters, int8_mask",
        """
        models:
          - {model: A, parameters: {density: [1, 0.7, 0.1], weight: 1.0}}
          - {model: B, parameters: {density: 0.5, weight: [0, 0.3, 0.7, 1]}}
          - model: C
            parameters:
              density: 0.33
              weight:
                - {filter: mlp, value: 0.5}
                - {value: 0}
        base_model: BASE
        parameters: {normalize: true, int8_mask: true}
        """,
    ),
    (
        "ties",
        "normalize: false, int8_mask, lambda",
        """
        models:
          - {model: A, parameters: {weight: 0.5, density: 0.5}}
          - {model: B, parameters: {weight: 0.5, density: 0.5}}
        base_model: BASE
        parameters: {normalize: false, int8_mask: true, lambda: 1.3}
        """,
    ),
    (
        "ties",
        "base among the models, values from the top",
        """
        models: [{model: A}, {model: BASE}, {model: B}, {model: C}]
        base_model: BASE
        parameters:
          weight: [0.4, 0.8]
          density:
            - {filter: self_attn, value: [0.9, 0.2]}
            - {filter: lm_head, value: 0.05}
            - {value: 0.6}
        """,
    ),
    (
        "ties",
        "negative weight, tiny density",
        """
        models:
          - {model: A, parameters: {weight: 1.0, density: 0.001}}
          - {model: B, parameters: {weight: -0.5, density: 0.4}}
          - {model: C, parameters: {weight: 0.7, density: 1.0}}
        base_model: BASE
        """,
    ),
    (
        "ties",
        "lambda with gradient and filter, density from 0",
        """
        models:
          - {model: A, parameters: {weight: 0.5, density: 0.2}}
          - {model: B, parameters: {weight: 0.7, density: [0.0, 1.0]}}
        base_model: BASE
        parameters:
          lambda:
            - {filter: mlp, value: [0.2, 1.4]}
            - {filter: norm, value: 0.0}
          normalize: [true, false, true]
        """,
    ),
    (
        "ties",
        "slices, base below",
        """
        slices:
          - sources:
              - {model: A, layer_range: [0, 4], parameters: {weight: [0.2, 0.8], density: [0.9, 0.4]}}
              - {model: BASE, layer_range: [0, 4]}
              - {model: B, layer_range: [0, 4], parameters: {weight: 0.5}}
          - sources:
              - {model: BASE, layer_range: [3, 6]}
              - {model: C, layer_range: [3, 6], parameters: {weight: [1, 0.1]}}
            parameters: {density: 0.25}
        base_model: BASE
        parameters: {density: 0.5}
        """,
    ),
    (
        "breadcrumbs",
        "three inputs, gamma from a gradient",
        """
        models:
          - {model: A, parameters: {weight: 0.5, density: 0.5, gamma: [0.0, 0.2]}}
          - {model: B, parameters: {weight: -0.3, density: 0.3}}
          - {model: C, parameters: {weight: 0.4, density: 0.7, gamma: 0.05}}
        base_model: BASE
        parameters: {lambda: 1.1}
        """,
    ),
    (
        "breadcrumbs",
        "gamma shrinks to fit; to the old norm; normalize",
        """
        models:
          - {model: A, parameters: {weight: 0.5, density: 0.9, gamma: 0.4}}
          - {model: B, parameters: {weight: 0.8, density: [0.6, 1.0], gamma: 0.5}}
        base_model: BASE
        parameters: {rescale: true, normalize: true}
        """,
    ),
    (
        "breadcrumbs_ties",
        "defaults, density and weight from a gradient",
        """
        models:
          - {model: A, parameters: {weight: 0.5, density: [0.9, 0.1]}}
          - {model: B, parameters: {weight: [0.2, 0.9], density: 0.3}}
          - {model: C, parameters: {weight: 0.4, density: 0.7}}
        base_model: BASE
        """,
    ),
    (
        "breadcrumbs_ties",
        "normalize, a negative weight, to the old norm",
        """
        models:
          - {model: A, parameters: {weight: 0.5, density: 0.5, gamma: 0.1}}
          - {model: B, parameters: {weight: -0.7, density: 0.4}}
          - {model: C, parameters: {weight: 0.4, density: 0.7, gamma: 0.3}}
        base_model: BASE
        parameters: {normalize: true, rescale: true, lambda: 0.9, int8_mask: true}
        """,
    ),
    (
        "della",
        "density 1 drops nothing: election and defaults",
        """
        models:
          - {model: A, parameters: {weight: 0.5}}
          - {model: B, parameters: {weight: -0.3}}
          - {model: C, parameters: {weight: 0.4, epsilon: 0.3}}
        base_model: BASE
        parameters: {lambda: 0.8}
        """,
    ),
    (
        "della_linear",
        "density 1 drops nothing: defaults; one density 0",
        """
        models:
          - {model: A, parameters: {weight: 0.5}}
          - {model: B, parameters: {weight: 0.7, density: 0}}
          - {model: C, parameters: {weight: 0.4}}
        base_model: BASE
        """,
    ),
    (
        "passthrough",
        "a stack of two models",
        """
        slices:
          - sources: [{model: A, layer_range: [0, 4]}]
          - sources: [{model: B, layer_range: [2, 6]}]
        """,
    ),
    (
        "passthrough",
        "block expansion: new blocks that add nothing",
        """
        slices:
          - sources: [{model: A, layer_range: [0, 3]}]
          - sources:
              - model: A
                layer_range: [2, 3]
                parameters:
                  scale:
                    - {filter: o_proj, value: 0.0}
                    - {filter: down_proj, value: 0.0}
                    - {value: 1.0}
          - sources: [{model: A, layer_range: [3, 6]}]
        """,
    ),
    (
        "passthrough",
        "scale with gradient and filter",
        """
        slices:
          - sources:
              - model: C
                layer_range: [0, 5]
                parameters:
                  scale:
                    - {filter: q_proj, value: [0.7, 1.1]}
                    - {filter: k_proj, value: 0.7}
          - sources: [{model: B, layer_range: [1, 6]}]
        """,
    ),
    (
        "passthrough",
        "three models interleaved",
        """
        slices:
          - sources: [{model: A, layer_range: [0, 2]}]
          - sources: [{model: B, layer_range: [1, 3]}]
          - sources: [{model: C, layer_range: [2, 4]}]
          - sources: [{model: A, layer_range: [3, 6]}]
        """,
    ),
    (
        "nuslerp",
        "weights, no base",
        """
        models:
          - {model: A, parameters: {weight: 0.7}}
          - {model: FAR, parameters: {weight: [0.4, 1.1]}}
        """,
    ),
    (
        "nuslerp",
        "between task vectors",
        """
        models:
          - {model: A, parameters: {weight: 0.7}}
          - {model: B, parameters: {weight: 0.2}}
        base_model: BASE
        """,
    ),
    (
        "nuslerp",
        "by the last dimension",
        """
        models:
          - {model: A, parameters: {weight: 0.7}}
          - {model: FAR, parameters: {weight: 0.4}}
        parameters: {nuslerp_flatten: false}
        """,
    ),
    (
        "nuslerp",
        "by the first dimension, between task vectors",
        """
        models:
          - {model: A, parameters: {weight: 0.7}}
          - {model: C, parameters: {weight: 0.4}}
        base_model: BASE
        parameters: {nuslerp_flatten: false, nuslerp_row_wise: true}
        """,
    ),
    (
        "multislerp",
        "three models",
        """
        models:
          - {model: A, parameters: {weight: 0.5}}
          - {model: FAR, parameters: {weight: 0.4}}
          - {model: C, parameters: {weight: [0.3, 0.9]}}
        """,
    ),
    (
        "multislerp",
        "task vectors, weights as they are",
        """
        models:
          - {model: A, parameters: {weight: 0.5}}
          - {model: B, parameters: {weight: 0.4}}
          - {model: C, parameters: {weight: 0.3}}
        base_model: BASE
        parameters: {normalize_weights: false}
        """,
    ),
    ("karcher", "three models", "models: [{model: A}, {model: FAR}, {model: C}]"),
    (
        "karcher",
        "more iterations",
        """
        models: [{model: FAR}, {model: B}]
        parameters: {max_iter: 50, tol: 1.0e-7}
        """,
    ),
    (
        "nearswap",
        "a step of the size of the task vectors",
        """
        models: [{model: A}, {model: B}]
        base_model: A
        parameters: {t: 0.0001}
        """,
    ),
    (
        "nearswap",
        "far apart, a gradient",
        """
        models: [{model: A}, {model: FAR}]
        base_model: A
        parameters: {t: [0.001, 0.03]}
        """,
    ),
    (
        "model_stock",
        "three models",
        """
        models: [{model: KIN}, {model: A}, {model: KIN2}]
        base_model: BASE
        """,
    ),
    (
        "model_stock",
        "by rows",
        """
        models: [{model: KIN}, {model: KIN2}]
        base_model: BASE
        parameters: {filter_wise: true}
        """,
    ),
    (
        "model_stock",
        "task vectors at right angles",
        """
        models: [{model: A}, {model: B}, {model: C}]
        base_model: BASE
        """,
    ),
    (
        "sce",
        "everything, small task vectors",
        """
        models: [{model: A}, {model: B}, {model: C}]
        base_model: BASE
        """,
    ),
    (
        "sce",
        "a tenth, large task vectors",
        """
        models: [{model: KIN}, {model: B}, {model: KIN2}]
        base_model: BASE
        parameters: {select_topk: 0.1}
        """,
    ),
    (
        "arcee_fusion",
        "far apart",
        """
        models: [{model: BASE}, {model: FAR}]
        base_model: BASE
        """,
    ),
    (
        "arcee_fusion",
        "a fine-tune",
        """
        models: [{model: BASE}, {model: A}]
        base_model: BASE
        """,
    ),
    (
        "ram",
        "three models",
        """
        models: [{model: A}, {model: B}, {model: C}]
        base_model: BASE
        parameters: {epsilon: 0.0002}
        """,
    ),
    (
        "ramplus_tl",
        "three models",
        """
        models: [{model: A}, {model: B}, {model: C}]
        base_model: BASE
        parameters: {epsilon: 0.0002, r: 0.5, alpha: 0.9}
        """,
    ),
]
RECIPES = [
    (method, idea, textwrap.dedent(body).strip() + f"\nmerge_method: {method}\ndtype: float32\n")
    for method, idea, body in _RECIPES
]

# mergekit's examples as its users run them; ORCA, WIZARD and PLATYPUS stand for 40-layer Llama models.
_EXAMPLES = {
    "linear.yml": """
        models:
          - model: ORCA
            parameters:
              weight: 1.0
          - model: WIZARD
            parameters:
              weight: 0.3
          - model: PLATYPUS
            parameters:
              weight: 0.5
        merge_method: linear
        dtype: float16
        """,
    "gradient-slerp.yml": """
        slices:
          - sources:
              - model: ORCA
                layer_range: [0, 40]
              - model: PLATYPUS
                layer_range: [0, 40]
        merge_method: slerp
        base_model: ORCA
        parameters:
          t:
            - filter: self_attn
              value: [0, 0.5, 0.3, 0.7, 1]
            - filter: mlp
              value: [1, 0.5, 0.7, 0.3, 0]
            - value: 0.5
        dtype: float16
        """,
    "ties.yml": """
        models:
          - model: ORCA
            parameters:
              density: [1, 0.7, 0.1]
              weight: 1.0
          - model: WIZARD
            parameters:
              density: 0.5
              weight: [0, 0.3, 0.7, 1]
          - model: PLATYPUS
            parameters:
              density: 0.33
              weight:
                - filter: mlp
                  value: 0.5
                - value: 0
        merge_method: ties
        base_model: LLAMA
        parameters:
          normalize: true
          int8_mask: true
        dtype: float16
        """,
    "orcamini-platy-44layer.yml": """
        slices:
          - sources:
            - model: ORCA
              layer_range: [0, 24]
          - sources:
            - model: PLATYPUS
              layer_range: [20, 40]
        merge_method: passthrough
        dtype: float16
        """,
    "bio-merge.yml": """
        models:
          - model: ORCA
            parameters:
              density: 0.5
              weight: 0.5
          - model: WIZARD
            parameters:
              density: 0.5
              weight: 0.5
        merge_method: ties
        base_model: LLAMA
        parameters:
          normalize: false
          int8_mask: true
        dtype: float16
        """,
    "gpt2-small.yml": """
        slices:
          - sources:
            - model: GPT2
              layer_range: [0, 8]
        merge_method: passthrough
        dtype: float16
        """,
}
EXAMPLES = {name: textwrap.dedent(body).strip() + "\n" for name, body in _EXAMPLES.items()}
