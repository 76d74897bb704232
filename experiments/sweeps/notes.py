"""Comments below the tables of the grids in `grids.py`."""

NOTES = {
    "mqar": (
        "Attention solves the task at every width, as in the paper (arXiv 2312.04927, with larger "
        "sizes). Mamba, the other layer in both comparisons, needs width 64 and one of the two "
        "learning rates. Gated DeltaNet, whose states are matrices, solves it from width 32 on. "
        "LRU, S5 and GateLoop do not solve it at any of these widths. The decays of LRU and S5 do "
        "not depend on the input. GateLoop has no convolution that combines neighboring tokens. "
        "An accuracy of 0.25 means that the model outputs one of the four stored values "
        "at random."
    ),
    "parity": (
        "As in the paper, DeltaNet and Mamba need eigenvalues of both signs. Here every symbol has "
        "an answer, not only the last one. A model that counts up to 40 answers the first 40 "
        "symbols correctly, so the other scaled accuracies are above 0. After 1,500 "
        "steps GRU and LSTM have learned the task; the elementwise cells ParaGRU and ParaLSTM have "
        "not."
    ),
    "modular_arithmetic": (
        "No RNN reaches the published accuracy. The RNNs trained for 6,000 steps, the other "
        "models for 1,500. The horizon of an RNN is 13 to 20 answers, nearly the same at every "
        "test length. Expressions of the training length have 20 answers. The RNNs have learned "
        "expressions of the training length and do not generalize to longer ones. After 1,500 "
        "steps, Mamba is more accurate with eigenvalues of both signs than with positive "
        "eigenvalues. A GRU of twice the width learns no faster, and a learning rate of 0.01 is "
        "slower."
    ),
    "S3": (
        "A GRU learns the task in 6,000 steps and generalizes to six times the training length. "
        "The other models have not learned it after 1,500 steps. By then Mamba with eigenvalues of "
        "both signs is the most accurate, followed by DeltaNet with and without them. A model that "
        "knows only the sign of the permutation is right in a third of its answers at every "
        "length: DeltaNet with eigenvalues of both signs has learned little more."
    ),
    "selective_copying": (
        "As in the paper, the task needs input-dependent decays: Mamba and gated DeltaNet reach "
        "99 % after 1,600 steps, LRU and S5 do not after 4,000. With 64 positions, LRU and S5 are "
        "more accurate than the paper's S4 with 4,096."
    ),
    "induction_heads": (
        "All models solve the task at the training length, gated DeltaNet also at 64 times that "
        "length. Mamba does not generalize to it after 4,000 steps; the paper trains it on 256 "
        "tokens for many more steps."
    ),
    "curriculum": (
        "With a curriculum, sequences grow from 3 to 16 symbols over the first two thirds of the "
        "run. Mixed lengths are random from the start. After 1,500 steps of mixed lengths, the GRU "
        "knows the first two or three answers on S4. After 1,500 steps with a curriculum, a "
        "quarter of the answers are right, also at 16 times the training length. The GRU then "
        "knows the product up to a normal subgroup of four elements, and guesses among these four. "
        "Models learn a quotient of the group first: the sign on S3, and S3 on S4. A5 has no "
        "proper quotient to learn first. Other programs ran on the same cores, so the times are "
        "too long."
    ),
    "games": (
        "A return is 1 if all answers are right, -1 if all are wrong, and -0.5 at random. It is "
        "the mean over the last tenth of the run, with actions drawn from the policy."
    ),
    "listops": (
        "Accuracies are far below the published ones, although the expressions are shorter. "
        "Training is short: 2,000 steps of 32 are about six passes over 10,000 expressions, and "
        "the papers train on about ten times as many."
    ),
    "image_digits": (
        "pLSTM reads the image as a grid and S5 as a row of 64 pixels. pLSTM learns faster: its "
        "accuracy was 0.93 after 300 steps, and that of S5 was 0.74. Chimera trained for 300 "
        "steps, because a step takes 14 times the processor time of a step of pLSTM. It was still "
        "learning."
    ),
    "arrows": (
        "pLSTM is trained on 8 x 8 pixels. It is nearly as accurate on 12 x 12, and loses 6 "
        "percent of the answers on 16 x 16, four times as many pixels. S5 and Chimera have not run."
    ),
    "text": (
        "All layers use one learning rate and one seed, so small differences are not significant. "
        "Speeds are measured on one core while another run used the other core."
    ),
    "S5": (
        "DeltaNet and GRU have not learned the task after 1,500 steps: they answer the first "
        "symbol only, where the answer is the symbol itself."
    ),
    "layers": (
        "All layers use one learning rate and one seed, and models differ in size. Runs are short: "
        "small differences are not significant. Speeds are tokens per second of processor time on "
        "one core, in float32, over those of LRU. Other programs used the machine at the same "
        "time. On a GPU or TPU the order differs: there, matrix states run on matrix units. The "
        "evaluation carries states over 2,048 bytes, and training windows have 128 bytes. There, "
        "UnICORNN, Atlas, SRWM, Titans and URN have 0.25 to 1.1 bits more than in their last "
        "training step. Their states probably grow larger than in training. Linear attention "
        "without decays or positions (also Performer, TransNormer, Based and ReBased) has 3.5 "
        "bits. That is the entropy of a byte given the byte before it, 3.47 bits in 3 MB of this "
        "text."
    ),
    "A5": (
        "No model has learned the task after 1,500 steps, not even GRU and LSTM, which reach 100 % "
        "in the paper. With a horizon of 1, a model knows only the first answer, which is the "
        "symbol itself. The RNNs do not know the product of two elements. There are 3,600 such "
        "products, and each is the second answer of 27 training sequences. One in 22 answers in "
        "the loss is a second answer."
    ),
}
