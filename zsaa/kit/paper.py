"""The paper's published numbers, transcribed cell by cell from its Tables 1 to 4 ("-" in the paper is None here).

Source: S. Kachuee and M. Sharifkhani, "Efficient Large Language Models with Zero-Shot Adjustable Acceleration".
"""

# Table 1: GPT-2 (137M), speed-up -> column -> F1 (MRPC, QQP) or accuracy (others), percent. GLUE on validation sets.
TABLE_1_COLUMNS = ("IMDB", "MNLIm", "MNLImm", "RTE", "QQP", "QNLI", "SST-2", "MRPC")
TABLE_1 = {
    1: dict(zip(TABLE_1_COLUMNS, (92.40, 80.55, 81.26, 63.54, 84.16, 85.06, 89.91, 83.53))),
    2: dict(zip(TABLE_1_COLUMNS, (92.34, 80.53, 81.25, 64.26, 84.16, 85.06, 89.56, 83.78))),
    3: dict(zip(TABLE_1_COLUMNS, (92.16, 80.44, 80.77, 63.18, 84.16, 84.86, 88.88, 83.19))),
    5: dict(zip(TABLE_1_COLUMNS, (91.13, 76.42, 77.79, 62.45, 80.10, 81.91, 82.00, 76.16))),
    7: dict(zip(TABLE_1_COLUMNS, (90.53, 74.56, 74.97, 63.18, 80.17, 78.8, None, None))),
    9: dict(zip(TABLE_1_COLUMNS, (90.05, None, None, 56.32, 77.74, 69.63, None, None))),
    11: dict(zip(TABLE_1_COLUMNS, (86.48, None, None, None, None, None, None, None))),
}
TABLE_1_MODEL = "GPT-2 (137M)"
TABLE_1_HUB = ("openai-community/gpt2", "gpt2")  # its names on the Hugging Face hub
# Section 4.2, and Eq. 3 for GPT-2; what the paper leaves open is not in here.
TABLE_1_RECIPE = {
    "method": "alpha-sampled",
    "tuning": "full",
    "alpha_range": [0.02, 1.0],
    "tau": 5,
    "score": "column_sum",
    "schedule": "geometric",  # Eq. 2; results that name none are of it
    "sampling": "alpha",
    "learning_rate": 4e-5,
    "batch_size": 8,
    "gradient_accumulation": 1,
    "epochs": 5.0,
    "max_steps": -1,
    "dropout": 0.1,
}

TAU = TABLE_1_RECIPE["tau"]  # what its claims are audited by, whatever the default of the dial is

# Table 2: GPT-2 (137M), time-to-first-token speed-up -> data set -> perplexity. 1BW on 0.5% of its test set.
TABLE_2_COLUMNS = ("WikiText-103", "LAMBADA", "PTB", "1BW")
TABLE_2 = {
    1: dict(zip(TABLE_2_COLUMNS, (34.48, 52.14, 38.69, 48.89))),
    2: dict(zip(TABLE_2_COLUMNS, (39.10, 55.56, 46.40, 49.20))),
    3: dict(zip(TABLE_2_COLUMNS, (48.59, 62.16, 59.07, 52.30))),
}
TABLE_2_MODEL = "GPT-2 (137M)"
TABLE_2_MODELS = ("gpt2", "openai-community/gpt2")  # on the Hugging Face hub

# Table 3: 4-bit models on MMLU, MAC reduction -> score (percent), GPU footprint reduction (without the model), alpha.
TABLE_3_COLUMNS = ("MMLU", "GPU footprint", "alpha")
TABLE_3 = {
    "LLaMA-3-8B-4bit": {
        1: dict(zip(TABLE_3_COLUMNS, (62.95, 1.00, 1.00))),
        1.5: dict(zip(TABLE_3_COLUMNS, (58.28, 1.70, 0.99))),
        2.5: dict(zip(TABLE_3_COLUMNS, (54.32, 2.05, 0.98))),
        3.5: dict(zip(TABLE_3_COLUMNS, (49.95, 2.72, 0.97))),
    },
    "Gemma-2-2B-4bit": {
        1: dict(zip(TABLE_3_COLUMNS, (60.21, 1.00, 1.00))),
        1.5: dict(zip(TABLE_3_COLUMNS, (54.60, 1.67, 0.99))),
        2.5: dict(zip(TABLE_3_COLUMNS, (49.15, 1.70, 0.97))),
        3.5: dict(zip(TABLE_3_COLUMNS, (45.51, 1.71, 0.96))),
    },
}
# The checkpoints on the Hugging Face hub that the names of Table 3 stand for (base models, quantized on loading).
TABLE_3_MODELS = {"LLaMA-3-8B-4bit": "meta-llama/Meta-Llama-3-8B", "Gemma-2-2B-4bit": "google/gemma-2-2b"}

# Table 4: model -> architecture facts.
TABLE_4_COLUMNS = ("type", "size", "layers", "heads", "hidden size", "activation", "residual", "attention")
TABLE_4 = {
    "GPT-2": dict(zip(TABLE_4_COLUMNS, ("Decoder", "355M", 24, 16, 1024, "GeLU", "Pre-Norm", "MHA"))),
    "Gemma 2": dict(zip(TABLE_4_COLUMNS, ("Decoder", "2B", 26, 8, 2304, "SwiGLU", "Pre-Norm", "MQA"))),
    "Mistral": dict(zip(TABLE_4_COLUMNS, ("Decoder", "7B", 32, 32, 4096, "SwiGLU", "Pre-Norm", "GQA"))),
    "LLaMA 3": dict(zip(TABLE_4_COLUMNS, ("Decoder", "8B", 32, 32, 4096, "SwiGLU", "Pre-Norm", "GQA"))),
}
