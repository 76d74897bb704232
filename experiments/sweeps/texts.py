"""Question, setup and answer of the grids in `grids.py` and `language.py`."""

from typing import NamedTuple


class Text(NamedTuple):
    """Text of a section of the report.

    Attributes:
      question: one sentence.

      setup: model, data and training, in at most three lines.

      answer: at most two sentences about the stored results, after an optional "Yes."; "" if the
        grid has not run.

      details: further observations, differences from the papers, and limits.
    """

    question: str
    setup: str
    answer: str = ""
    details: str = ""


_TRACKING = (
    "Two blocks of width 64. Every symbol has an answer. Training has 1,500 batches of 64 "
    "sequences of 3 to 40 symbols, unless the table says otherwise."
)
_TAUGHT = (
    " With a curriculum, one mixer of width 128 without an MLP trains on up to 8,000 batches of up "
    "to 12,800 symbols, and sequences grow from 3 symbols to the training length."
)
_PRODUCT = (
    "One mixer of width 64 without an MLP. Training has up to 2,000 batches of 256 rows, and "
    "sequences grow from 3 to 16 symbols over the first 390 batches."
)
_RECALL = "Two blocks of width 64. Training has up to 4,000 batches of 32, and stops at 99 %."

TRACKING_TEXT = Text(
    "Which layers track which states, at the training length and on longer sequences?",
    "A cell has the accuracy, scaled so that guessing has 0 and a perfect model 1. The left panel "
    "is for 39 or 40 symbols, the training length (DeltaProduct: 16), and the right panel for 255 "
    "or 256 symbols. Gray cells have not run. The sections below have the setup of each row.",
    "A GRU solves parity and S3, and with a curriculum also modular arithmetic and, at the "
    "training length, A5. Of the linear layers, those with eigenvalues of both signs track parity "
    "beyond the training length, and DeltaProduct with two or more updates learns S3.",
    "Rows without a curriculum trained for 1,500 steps, or 6,000 steps: nonlinear layers on "
    "modular arithmetic, and the GRU on S3. A cell has one seed, because the longest runs take "
    "about an hour. If an accuracy at 256 symbols is far below that at 40 symbols, the model gives "
    "right answers to the first symbols only.",
)

TEXTS = {
    "parity": Text(
        "Which layers track the parity of a sequence of bits, also on longer sequences?",
        _TRACKING,
        "DeltaNet and Mamba need eigenvalues of both signs, as in the paper. GRU and LSTM learn "
        "the task; the elementwise cells ParaGRU and ParaLSTM have not after 1,500 steps.",
        "Here every symbol has an answer, not only the last one. A model that counts up to 40 "
        "answers the first 40 symbols correctly, so the other scaled accuracies are above 0.",
    ),
    "modular_arithmetic": Text(
        "Do recurrent layers evaluate sums and products modulo 5, as in the ParaRNN paper?",
        "Two blocks of width 64. Every other symbol has an answer. Batches have 64 expressions of "
        "3 to 39 symbols." + _TAUGHT,
        "Yes. With a curriculum and large batches, a GRU is right everywhere at the training "
        "length, and in all but 2 of 65,536 answers at six times that length. With small batches "
        "of mixed lengths, RNNs learn expressions of the training length, and do not generalize to "
        "longer ones.",
        "Only the GRU trained with a curriculum, for one seed, because a run takes about 50 "
        "minutes. It stopped at step 6,500, when all answers to 128 of the longest test sequences "
        "were right. The other RNNs trained for 6,000 steps, and have a horizon of 13 to 20 "
        "answers, nearly the same at every test length. Expressions of the training length have 20 "
        "answers. After 1,500 steps, Mamba is more accurate with eigenvalues of both signs than "
        "with positive eigenvalues.",
    ),
    "S3": Text(
        "Which layers track products of permutations of three elements?",
        _TRACKING,
        "A GRU learns the task in 6,000 steps and generalizes to six times the training length. "
        "The other models have not learned it after 1,500 steps.",
        "By then Mamba with eigenvalues of both signs is the most accurate, followed by DeltaNet "
        "with and without them. A model that knows only the sign of the permutation is right in a "
        "third of its answers at every length. DeltaNet with eigenvalues of both signs has learned "
        "little more.",
    ),
    "A5": Text(
        "Which layers track products of even permutations of five elements, the smallest group "
        "that is not solvable?",
        _TRACKING + _TAUGHT,
        "A GRU does, with a curriculum and large batches: it answers 98 % right at the training "
        "length, and 46 % at six times that length. With small batches of mixed lengths, no model "
        "has learned the task after 1,500 steps.",
        "In the paper, GRU and LSTM reach 100 %. Here the GRU was still learning: its loss fell "
        "until the end. Only this model trained with a curriculum, for one seed, because a run "
        "takes 44 minutes. The other models have a horizon of 1 to 2. With a horizon of 1, a model "
        "knows only the first answer, which is the symbol itself, and not the product of two "
        "elements. There are 3,600 such products. In the first runs, each is the second answer of "
        "27 training sequences in all. With the curriculum, a batch has 4,160 sequences of three "
        "symbols. After 2,500 steps, with sequences of up to 8 symbols, the horizon of the GRU was "
        "already 45. It had learned the product, not only short sequences.",
    ),
    "S5": Text(
        "Which layers track products of permutations of five elements?",
        _TRACKING,
        "DeltaNet and GRU have not learned the task after 1,500 steps: they answer the first "
        "symbol only, where the answer is the symbol itself.",
    ),
    "curriculum": Text(
        "Does a GRU learn products of permutations faster with a curriculum over length?",
        "One block with a GRU of 128 features. Batches have 64 sequences of 3 to 16 symbols. With "
        "a curriculum, sequences grow from 3 to 16 symbols over the first two thirds of the run. "
        "Mixed lengths are random from the start.",
        "Yes. After 1,500 steps on S4 with a curriculum, a quarter of the answers are right, also "
        "at 16 times the training length. With mixed lengths, the GRU knows the first two or three "
        "answers only.",
        "With a curriculum, the GRU knows the product up to a normal subgroup of four "
        "elements, and guesses among these four. Models learn a quotient of the group first: the "
        "sign on S3, and S3 on S4. A5 has no proper quotient to learn first. Other programs ran on "
        "the same cores, so the times are too long.",
    ),
    "deltaproduct": Text(
        "How many updates per symbol does DeltaProduct need for each group?",
        _PRODUCT,
        "Two updates suffice for S3, and one does not, as in the paper (arXiv 2502.10297). S4, A5 "
        "and S5 were not learned in 2,000 steps.",
        "On S4 the accuracy grows with the number of updates. S5 ran with one update only. "
        "S4 and A5 are groups of rotations of space, and a rotation is a product of two "
        "reflections, so two updates can represent them. A permutation of five elements is a "
        "product of up to four exchanges. The paper trains on longer sequences. With 3 updates, a "
        "model trained on up to 16 symbols of S3 answers 95 % right at 256 symbols. One seed, and "
        "no learning-rate sweep, because 16 runs take an hour.",
    ),
    "families": Text(
        "Which families of layers track states, with one setup for all?",
        _PRODUCT + " The map shows scaled accuracies at 2.5 and 16 times the training length: "
        "guessing has 0, and a perfect model 1.",
        "GRU, LSTM and block_linear track parity, cycle navigation and S3, and GRU and LSTM track "
        "parity and S3 also at 16 times the training length. DeltaProduct tracks parity and S3; "
        "Mamba, DeltaNet, gated DeltaNet, Comba and sLSTM track parity only.",
        "The transitions of block_linear are dense blocks. A layer tracks a state if 97 % of its "
        "answers at 40 symbols are right. LRU, minGRU, GLA, mLSTM, KDA, RWKV-7 and attention track "
        "none. At 256 symbols, GRU, LSTM, sLSTM and block_linear are always right on parity. On "
        "S3, GRU and LSTM are then always right, DeltaProduct in 75 % of its answers, and "
        "block_linear in 53 %. At 40 symbols, block_linear is right in half of the answers of "
        "A5, and the other layers in 4 to 7 %. One seed, and no learning-rate sweep, because "
        "a run takes up to 21 minutes, beside other programs on the same cores.",
    ),
    "regular_languages": Text(
        "Which layers learn regular languages other than groups?",
        "One mixer of width 64 without an MLP. Training has up to 1,000 batches of 256 rows, and "
        "sequences grow from 3 to 16 symbols over the first 390 batches. Every symbol has an "
        "answer: for the brackets (star_free, dyck) the set of symbols that may follow.",
    ),
    "mqar": Text(
        "How wide must a layer be to recall several key-value pairs?",
        "Two blocks. Training has up to 4,000 batches of 32, and stops at 99 %. Sequences have 32 "
        "tokens, 4 pairs and 64 symbols (paper: 512, 64 and 8,192).",
        "Attention solves the task at every width, as in the paper (arXiv 2312.04927), and gated "
        "DeltaNet, whose states are matrices, from width 32 on. Mamba needs width 64 and one of "
        "the two learning rates; LRU, S5 and GateLoop solve it at none of these widths.",
        "Mamba is the other layer in both comparisons. The decays of LRU and S5 do not depend on "
        "the input. GateLoop has no convolution that combines neighboring tokens. An accuracy of "
        "0.25 means that the model outputs one of the four stored values at random.",
    ),
    "selective_copying": Text(
        "Does copying of marked tokens need decays that depend on the input?",
        _RECALL,
        "Yes, as in the paper. Mamba and gated DeltaNet reach 99 % after 1,600 steps, LRU and S5 "
        "do not after 4,000.",
        "With 64 positions, LRU and S5 are more accurate than the paper's S4 with 4,096.",
    ),
    "induction_heads": Text(
        "Do layers that find the token after a repeated one generalize to longer sequences?",
        _RECALL,
        "All models solve the task at the training length, and gated DeltaNet also at 64 times "
        "that length. Mamba does not generalize to it after 4,000 steps; the paper trains it on "
        "256 tokens for many more steps.",
    ),
    "passkey": Text(
        "How accurate are passkeys from texts that are longer than in training?",
        _RECALL + " The text repeats 8 tokens. Attention reads the last 64 tokens.",
        "Gated DeltaNet is always right at 16 times the training length, and in 80 % of the digits "
        "at 64 times. GRU and Mamba are always right at the training length and in more than 70 % "
        "at 16 times, and LRU does not learn the task.",
        "Two blocks of attention over 64 tokens reach back 126 tokens, so attention cannot find "
        "most passkeys in longer texts. A digit is right by chance in 10 % of the answers. One "
        "seed, because a run takes up to 11 minutes beside another one.",
    ),
    "needles": Text(
        "How accurate are the values of one of several keys, in texts longer than in training?",
        _RECALL + " The text is random. Attention reads the last 64 tokens.",
    ),
    "match_to_sample": Text(
        "Do layers remember the first token over a delay that is longer than in training?",
        _RECALL + " Distractors lie between the two tokens. Attention reads the last 64 tokens.",
    ),
    "linear_functions": Text(
        "Do layers learn a linear function of 8 features from examples in the sequence?",
        "Two blocks of width 64. Training has 4,000 batches of 32 sequences of 17 examples. Errors "
        "are squares over the mean square of the targets, after 4, 8 and 16 examples, for random "
        "functions. Least squares is optimal.",
        "Only partly: after 16 examples, gated DeltaNet has an error of 9 % and Mamba one of 17 %, "
        "where least squares has none. Attention has 30 %, GRU 44 %, and LRU 62 %.",
        "In the paper (arXiv 2208.01066) transformers come close to least squares, with 12 blocks "
        "of width 256 and 500,000 batches of 64. After 4 examples the function is not yet "
        "determined, and gated DeltaNet is within 10 % of the optimum. One seed, because a run "
        "takes up to 7 minutes.",
    ),
    "languages": Text(
        "Do layers learn a language from the words in the sequence?",
        "Two blocks of width 64. Training has 1,000 batches of 32 sequences of 256 symbols. Each "
        "sequence has words of another random automaton, and the model predicts the next symbol.",
    ),
    "games": Text(
        "Which layers learn games that need memory, with PPO?",
        "Two blocks of width 64. An iteration plays 64 games for 64 steps each, then makes four "
        "passes over them; there are 150 iterations. A return is 1 if all answers are right, -1 if "
        "all are wrong, and -0.5 at random.",
        "LRU is best in both games, with 0.99 or more in Repeat Previous and 0.9 or more in "
        "Autoencode, then DeltaNet and GRU. FFM and minGRU are last, against the claim of FFM's "
        "paper.",
        "A return is the mean over the last tenth of the run, with actions drawn from the policy. "
        "The paper of FFM (arXiv 2310.04128) reports the highest returns on POPGym for FFM. Here "
        "Autoencode has 12 cards (POPGym: 52), and all layers use one learning rate and train for "
        "614,400 steps of a game.",
    ),
    "listops": Text(
        "How accurate are LRU and S5 on nested list operations?",
        "Two blocks of width 64. Training has 2,000 batches of 32, from 10,000 expressions.",
        "Accuracies are far below the published ones, although the expressions are shorter. "
        "Training is short: 2,000 batches are about six passes over 10,000 expressions, and the "
        "papers train on about ten times as many.",
    ),
    "packages": Text(
        "How well do LRU and S5 tell which package a window of source code comes from?",
        "Two blocks of width 64, 1,000 batches of 32 windows from Python's standard library.",
        "LRU is right on 73 % of the windows and S5 on 57 %, and guessing is right on 17 %.",
    ),
    "digits": Text(
        "How accurate are layers that read an image pixel by pixel?",
        "Two blocks of width 64, 1,500 batches of 32 of scikit-learn's digits.",
        "All three reach 96 % or more, LRU the most.",
    ),
    "image_digits": Text(
        "Does a layer over a grid learn images better than a layer over the row of their pixels?",
        "Two blocks of width 16, 1,500 batches of 32 of scikit-learn's digits. S5 reads the pixels "
        "row after row, in both directions.",
        "pLSTM over the grid ends a little above S5 and learns faster. After 300 steps, its "
        "accuracy was 0.93, and that of S5 was 0.74.",
        "Chimera trained for 300 steps, because a step takes 14 times the processor time of a step "
        "of pLSTM. It was still learning.",
    ),
    "arrows": Text(
        "Do layers over a grid generalize from small to larger images?",
        "Two blocks of width 16, 4,000 batches of 32 images of 8 x 8 pixels. The question is "
        "whether an arrow points to a circle.",
        "pLSTM does. It is nearly as accurate on 12 x 12 as on 8 x 8, and loses 6 percent of the "
        "answers on 16 x 16, four times as many pixels.",
        "S5 and Chimera have not run.",
    ),
    "time_series": Text(
        "How accurate are LRU and S5 on small data sets of time series?",
        "Two blocks of width 64, 500 batches of 32 of data sets that come with aeon.",
        "On two of three data sets both reach 97 % or more. On OSULeaf they reach 76 and 79 %.",
    ),
    "text": Text(
        "How well do layers model text with one number of parameters?",
        "Two blocks of width 128, 500 batches of 16 x 128 bytes of Python's standard library. The "
        "widths of the MLPs give every model 463,000 parameters within a percent.",
        "Mamba is best with 1.85 bits per byte, then gated DeltaNet. Of the nonlinear RNNs, GRU "
        "and ParaGRU are best with 1.97.",
        "All layers use one learning rate and one seed, so small differences are not significant. "
        "Speeds are measured on one core while another run used the other core.",
    ),
    "linux": Text(
        "How well do layers model the documentation of Linux, each with its best learning rate?",
        "Two blocks of width 128, 500 batches of 16 x 128 bytes of the .rst files of the Debian "
        "package linux-doc-6.1 (24 MB), unpacked into the folder linux-doc. The widths of the MLPs "
        "give every model 463,000 parameters within a percent.",
        "Mamba is best with 2.45 bits per byte, and LRU, gated DeltaNet, S5 and GRU follow with "
        "2.54 to 2.56. Only these, LEM and ParaGRU have fewer bits than gzip, 2.59.",
        "xz has 2.19 on the same bytes. All layers but GateLoop are better with a learning rate of "
        "0.01 than with 0.003, so larger ones may be better still. One seed, so small differences "
        "are not significant: 32 runs take an hour.",
    ),
    "hybrid": Text(
        "How many recurrent blocks can share one block with attention?",
        "Eight blocks of width 64, 500 batches of 16 x 128 bytes of Python's standard library. "
        "Attention reads the last 64 bytes. The widths of the MLPs give every model 443,000 "
        "parameters within 1.5 percent.",
    ),
    "lengths": Text(
        "Which layers predict sequences that are up to 16 times longer than in training?",
        "Two blocks of width 128, 500 batches of 16 x 128 bytes of Python's standard library. "
        "Columns are for bytes T / 2 to T of sequences of 2,048 bytes, the first column for the "
        "first 128 bytes. Two rows change a trained Mamba-2 against state collapse, as Stuffed "
        "Mamba (arXiv 2410.07145) does.",
        "All of them do: only for RetNet and DeltaNet, bits per byte at 2,048 bytes are above "
        "those at 256 bytes, by 0.02 and 0.01. The states of Mamba-2 do not collapse at these "
        "lengths, so the changes against it do not help.",
        "The best layers are Mamba and Mamba-2. Two seeds, which differ in the held-out text, so "
        "compare rows and not ranges. RetNet and DeltaNet, which have no decays that "
        "depend on the input, gain nothing from the longer context. Stuffed Mamba finds the "
        "collapse in larger models, on sequences of many thousand tokens.",
    ),
    "layers": Text(
        "Does every layer of the library train?",
        "Two blocks of width 64, 200 batches of 8 x 128 bytes of Python's standard library.",
        "Yes. After 200 steps, Mamba-2, block_linear and Mamba have the fewest bits per byte. "
        "Small differences are not significant, because models differ in size and runs are short.",
        "All layers use one learning rate and one seed. Speeds are tokens per second of processor "
        "time on one core, in float32, over those of LRU. Other programs used the machine at the "
        "same time. On a GPU or TPU the order differs: there, matrix states run on matrix units. "
        "The evaluation carries states over 2,048 bytes, and training windows have 128 bytes. "
        "There, UnICORNN, Atlas, SRWM, Titans and URN have 0.25 to 1.1 bits more than in their "
        "last training step. Their states probably grow larger than in training. Linear attention "
        "without decays or positions (also Performer, TransNormer, Based and ReBased) has 3.5 "
        "bits. That is the entropy of a byte given the byte before it, 3.47 bits in 3 MB of this "
        "text.",
    ),
}
