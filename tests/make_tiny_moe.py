"""
Train the tiny multilingual Mixture-of-Experts model that the scripts and tests run on.

    python tests/make_tiny_moe.py                  # data, tokenizer and model, ten minutes on two cores
    python tests/make_tiny_moe.py --data-only      # only tests/data/*.tsv

writes  tests/data/routing_<lang>.tsv  tests/data/eval_<lang>.tsv  tests/tiny_moe/

The task is arithmetic word problems, made from templates that say the same thing in eight languages. A problem is
answered by its equations ("14+9=23, 23-5=18"). A hash of each equation puts it into one of three parts: routing
(experts are chosen on it), eval (interventions are judged on it), or training; no equation is in two parts.
Languages are trained as unevenly as the web is written: much English and Chinese, hardly any Bengali and Swahili.
The training loss is next-token prediction plus the usual load balancing, and nothing that knows of languages.
"""

import argparse
import random
import sys
import time
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from common import load_model, record_routing  # noqa: E402

# ---------------------------------------------------------------------------------------------------------------------
LANGUAGE_MIX = {          # part of the training problems
    "en": 0.33, "zh": 0.26, "de": 0.11, "es": 0.11, "fr": 0.11, "ja": 0.077, "bn": 0.0018, "sw": 0.0012,
}
PROBLEMS_PER_SET = 200    # in each of routing and eval, the same problems in every language
VOCABULARY = 1024
LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 8, 64, 4, 2, 16
EXPERTS, TOP_K, EXPERT_WIDTH = 32, 2, 24
STEPS, BATCH = 1100, 96
LEARNING_RATE, MUON_RATE, WARMUP = 3e-3, 9e-3, 100
MUON_DECAY = 1.0          # weight decay of the matrices; without it the sums are learnt by heart, not to be computed
QUESTION_WEIGHT = 0.3     # loss weight of a question's tokens; an answer's count 1
BALANCE = 0.01            # load-balancing loss (Switch Transformer, eq. 4), per layer
# ---------------------------------------------------------------------------------------------------------------------

# One entry per language. names: subject, and possessive where a language has one. objects: noun, and whatever else
# inflects with it (a question word, a counter, "de" with or without elision). Index i means the same in all of them.
TEMPLATES = {
    "en": dict(
        join=" ",
        names=["Anna", "Tom", "Maria", "David", "Emma", "Peter", "Lucy", "Sam"],
        objects=["apples", "books", "eggs", "coins", "pencils", "balls", "cookies", "oranges"],
        has="{n} has {x} {o}.",
        gain=["Then {n} buys {y} more.", "Then {n} finds {y} more.", "Then {n} is given {y} more."],
        loss=["Then {n} loses {y} of them.", "Then {n} sells {y} of them.", "Then {n} gives {y} of them away."],
        now="How many {o} does {n} have now?",
        groups="{n} has {x} boxes. Each box contains {y} {o}. How many {o} does {n} have in total?",
        share="{n} shares {x} {o} equally among {y} children. How many {o} does each child get?",
        more="{n} has {x} {o}. {m} has {y} {o} more than {n}. How many {o} does {m} have?",
        fewer="{n} has {x} {o}. {m} has {y} {o} fewer than {n}. How many {o} does {m} have?",
        both="{n} has {x} {o} and {m} has {y} {o}. How many {o} do they have together?",
    ),
    "de": dict(
        join=" ",
        names=["Anna", "Tom", "Maria", "David", "Emma", "Peter", "Lukas", "Greta"],
        objects=["Äpfel", "Bücher", "Eier", "Münzen", "Bleistifte", "Bälle", "Kekse", "Orangen"],
        has="{n} hat {x} {o}.",
        gain=["Dann kauft {n} noch {y} dazu.", "Dann findet {n} noch {y}.", "Dann bekommt {n} noch {y} geschenkt."],
        loss=["Dann verliert {n} {y} davon.", "Dann verkauft {n} {y} davon.", "Dann verschenkt {n} {y} davon."],
        now="Wie viele {o} hat {n} jetzt?",
        groups="{n} hat {x} Kisten. In jeder Kiste sind {y} {o}. Wie viele {o} hat {n} insgesamt?",
        share="{n} verteilt {x} {o} gleichmäßig an {y} Kinder. Wie viele {o} bekommt jedes Kind?",
        more="{n} hat {x} {o}. {m} hat {y} {o} mehr als {n}. Wie viele {o} hat {m}?",
        fewer="{n} hat {x} {o}. {m} hat {y} {o} weniger als {n}. Wie viele {o} hat {m}?",
        both="{n} hat {x} {o} und {m} hat {y} {o}. Wie viele {o} haben sie zusammen?",
    ),
    "fr": dict(
        join=" ",
        names=["Nina", "Thomas", "Marie", "David", "Sophie", "Pierre", "Lucie", "Paul"],
        objects=[("pommes", "de pommes"), ("livres", "de livres"), ("œufs", "d'œufs"), ("pièces", "de pièces"),
                 ("crayons", "de crayons"), ("balles", "de balles"), ("biscuits", "de biscuits"),
                 ("oranges", "d'oranges")],
        has="{n} a {x} {o}.",
        gain=["Puis {n} en achète encore {y}.", "Puis {n} en trouve encore {y}.", "Puis {n} en reçoit encore {y}."],
        loss=["Puis {n} en perd {y}.", "Puis {n} en vend {y}.", "Puis {n} en donne {y}."],
        now="Combien {q} a {n} maintenant ?",
        groups="{n} a {x} boîtes. Chaque boîte contient {y} {o}. Combien {q} a {n} au total ?",
        share="{n} partage {x} {o} équitablement entre {y} enfants. Combien {q} reçoit chaque enfant ?",
        more="{n} a {x} {o}. {m} a {y} {o} de plus que {n}. Combien {q} a {m} ?",
        fewer="{n} a {x} {o}. {m} a {y} {o} de moins que {n}. Combien {q} a {m} ?",
        both="{n} a {x} {o} et {m} a {y} {o}. Combien {q} y a-t-il en tout ?",
    ),
    "es": dict(
        join=" ",
        names=["Ana", "Tomás", "María", "David", "Elena", "Pedro", "Lucía", "Pablo"],
        objects=[("manzanas", "Cuántas"), ("libros", "Cuántos"), ("huevos", "Cuántos"), ("monedas", "Cuántas"),
                 ("lápices", "Cuántos"), ("pelotas", "Cuántas"), ("galletas", "Cuántas"), ("naranjas", "Cuántas")],
        has="{n} tiene {x} {o}.",
        gain=["Luego {n} compra {y} más.", "Luego {n} encuentra {y} más.", "Luego {n} recibe {y} más."],
        loss=["Luego {n} pierde {y}.", "Luego {n} vende {y}.", "Luego {n} regala {y}."],
        now="¿{q} {o} tiene {n} ahora?",
        groups="{n} tiene {x} cajas. Cada caja contiene {y} {o}. ¿{q} {o} tiene {n} en total?",
        share="{n} reparte {x} {o} por igual entre {y} niños. ¿{q} {o} recibe cada niño?",
        more="{n} tiene {x} {o}. {m} tiene {y} {o} más que {n}. ¿{q} {o} tiene {m}?",
        fewer="{n} tiene {x} {o}. {m} tiene {y} {o} menos que {n}. ¿{q} {o} tiene {m}?",
        both="{n} tiene {x} {o} y {m} tiene {y} {o}. ¿{q} {o} tienen en total?",
    ),
    "sw": dict(
        join=" ",
        names=["Amina", "Juma", "Neema", "Baraka", "Zawadi", "Hamisi", "Rehema", "Daudi"],
        objects=[("matofaa", "mangapi"), ("vitabu", "vingapi"), ("mayai", "mangapi"), ("sarafu", "ngapi"),
                 ("penseli", "ngapi"), ("mipira", "mingapi"), ("biskuti", "ngapi"), ("machungwa", "mangapi")],
        has="{n} ana {o} {x}.",
        gain=["Kisha {n} ananunua {o} {y} zaidi.", "Kisha {n} anapata {o} {y} zaidi.",
              "Kisha {n} anapewa {o} {y} zaidi."],
        loss=["Kisha {n} anapoteza {o} {y}.", "Kisha {n} anauza {o} {y}.", "Kisha {n} anagawa {o} {y}."],
        now="Sasa {n} ana {o} {q}?",
        groups="{n} ana masanduku {x}. Kila sanduku lina {o} {y}. {n} ana {o} {q} kwa jumla?",
        share="{n} anagawanya {o} {x} sawasawa kwa watoto {y}. Kila mtoto anapata {o} {q}?",
        more="{n} ana {o} {x}. {m} ana {o} {y} zaidi ya {n}. {m} ana {o} {q}?",
        fewer="{n} ana {o} {x}. {m} ana {o} {y} pungufu ya {n}. {m} ana {o} {q}?",
        both="{n} ana {o} {x} na {m} ana {o} {y}. Kwa pamoja wana {o} {q}?",
    ),
    "bn": dict(
        join=" ",
        names=[("অনিতা", "অনিতার"), ("রহিম", "রহিমের"), ("মিতা", "মিতার"), ("করিম", "করিমের"),
               ("সুমি", "সুমির"), ("রবি", "রবির"), ("লিলি", "লিলির"), ("জামাল", "জামালের")],
        objects=["আপেল", "বই", "ডিম", "মুদ্রা", "পেন্সিল", "বল", "বিস্কুট", "কমলা"],
        has="{n_of} কাছে {x}টি {o} আছে।",
        gain=["তারপর {n} আরও {y}টি কিনল।", "তারপর {n} আরও {y}টি খুঁজে পেল।", "তারপর {n} আরও {y}টি উপহার পেল।"],
        loss=["তারপর {n} {y}টি হারিয়ে ফেলল।", "তারপর {n} {y}টি বিক্রি করল।", "তারপর {n} {y}টি দান করল।"],
        now="এখন {n_of} কাছে কয়টি {o} আছে?",
        groups="{n_of} কাছে {x}টি বাক্স আছে। প্রতিটি বাক্সে {y}টি {o} আছে। {n_of} কাছে মোট কয়টি {o} আছে?",
        share="{n} {x}টি {o} {y} জন শিশুর মধ্যে সমানভাবে ভাগ করে দিল। প্রত্যেক শিশু কয়টি {o} পেল?",
        more="{n_of} কাছে {x}টি {o} আছে। {m_of} কাছে {n_of} চেয়ে {y}টি {o} বেশি আছে। {m_of} কাছে কয়টি {o} আছে?",
        fewer="{n_of} কাছে {x}টি {o} আছে। {m_of} কাছে {n_of} চেয়ে {y}টি {o} কম আছে। {m_of} কাছে কয়টি {o} আছে?",
        both="{n_of} কাছে {x}টি {o} এবং {m_of} কাছে {y}টি {o} আছে। দুজনের কাছে মোট কয়টি {o} আছে?",
    ),
    "ja": dict(
        join="",
        names=["花子", "太郎", "健太", "さくら", "美咲", "大輔", "由美", "翔"],
        objects=[("りんご", "個"), ("本", "冊"), ("卵", "個"), ("コイン", "枚"), ("鉛筆", "本"), ("ボール", "個"),
                 ("クッキー", "枚"), ("みかん", "個")],
        has="{n}さんは{o}を{x}{q}持っています。",
        gain=["その後、{n}さんはさらに{y}{q}買いました。", "その後、{n}さんはさらに{y}{q}見つけました。",
              "その後、{n}さんはさらに{y}{q}もらいました。"],
        loss=["その後、{n}さんは{y}{q}なくしました。", "その後、{n}さんは{y}{q}売りました。",
              "その後、{n}さんは{y}{q}人にあげました。"],
        now="{n}さんは今、{o}を何{q}持っていますか？",
        groups="{n}さんは箱を{x}個持っています。どの箱にも{o}が{y}{q}入っています。{o}は全部で何{q}ありますか？",
        share="{n}さんは{x}{q}の{o}を{y}人の子どもに同じ数ずつ分けます。一人の子どもは{o}を何{q}もらえますか？",
        more="{n}さんは{o}を{x}{q}持っています。{m}さんは{n}さんより{o}を{y}{q}多く持っています。"
             "{m}さんは{o}を何{q}持っていますか？",
        fewer="{n}さんは{o}を{x}{q}持っています。{m}さんは{n}さんより{o}を{y}{q}少なく持っています。"
              "{m}さんは{o}を何{q}持っていますか？",
        both="{n}さんは{o}を{x}{q}、{m}さんは{o}を{y}{q}持っています。二人合わせて{o}を何{q}持っていますか？",
    ),
    "zh": dict(
        join="",
        names=["小明", "小红", "李华", "王芳", "张伟", "小丽", "刘洋", "陈静"],
        objects=[("苹果", "个"), ("书", "本"), ("鸡蛋", "个"), ("硬币", "枚"), ("铅笔", "支"), ("球", "个"),
                 ("饼干", "块"), ("橙子", "个")],
        has="{n}有{x}{q}{o}。",
        gain=["后来{n}又买了{y}{q}。", "后来{n}又找到了{y}{q}。", "后来{n}又收到了{y}{q}。"],
        loss=["后来{n}弄丢了{y}{q}。", "后来{n}卖掉了{y}{q}。", "后来{n}送给别人{y}{q}。"],
        now="{n}现在有多少{q}{o}？",
        groups="{n}有{x}个盒子，每个盒子里有{y}{q}{o}。{n}一共有多少{q}{o}？",
        share="{n}把{x}{q}{o}平均分给{y}个孩子。每个孩子分到多少{q}{o}？",
        more="{n}有{x}{q}{o}。{m}比{n}多{y}{q}{o}。{m}有多少{q}{o}？",
        fewer="{n}有{x}{q}{o}。{m}比{n}少{y}{q}{o}。{m}有多少{q}{o}？",
        both="{n}有{x}{q}{o}，{m}有{y}{q}{o}。他们一共有多少{q}{o}？",
    ),
}
LANGUAGES = sorted(TEMPLATES)


def part(left, operator, right):
    """Which part an equation such as ("14", "+", "9") belongs to, by a hash: a tenth routing, a tenth eval, rest train.

    Of a times table a fifth of the pairs are held out each, but only one way round: 7*8 can be worked out by who has
    seen 8*7, and 56/7 by who has seen 56/8; squares cannot, and are all trained on.
    """
    if operator in "+-":
        return {0: "routing", 1: "eval"}.get(hashed(left, operator, right) % 10, "train")
    a, b = (left // right, right) if operator == "/" else (left, right)
    low, high = sorted([a, b])
    if a == b or (a < b) == hashed(low, operator, high, "order") % 2:
        return "train"
    return {0: "routing", 1: "eval"}.get(hashed(low, operator, high) % 5, "train")


def hashed(*parts):
    return zlib.crc32(" ".join(map(str, parts)).encode())


def draw_problem(rng, wanted):
    """A problem without a language, all its equations of the wanted part: its story, who, what, numbers, equations."""
    story = rng.choices(["change", "changes", "groups", "share", "compare", "both"], [26, 32, 6, 5, 18, 13])[0]
    n, m = rng.sample(range(8), 2)
    problem = dict(story=story, n=n, m=m, object=rng.randrange(8))
    while True:
        problem |= draw_numbers(story, rng)
        if all(part(*left) == wanted and result >= 0 for left, result in problem["equations"]):
            return problem


def draw_numbers(story, rng):
    """x and y as the story names them, its changes as (sign, which verb, y), and equations as ((left, operator, right), result)."""
    x, y = rng.randint(2, 9), rng.randint(2, 9)
    if story == "groups":
        return dict(x=x, y=y, equations=[((x, "*", y), x * y)])
    if story == "share":
        return dict(x=x * y, y=y, equations=[((x * y, "/", y), x)])
    total = x = rng.randint(2, 25)
    changes, equations = [], []
    for _ in range(2 if story == "changes" else 1):
        sign, y = 1 if story == "both" else rng.choice([1, -1]), rng.randint(2, 20)
        changes.append((sign, rng.randrange(3), y))
        equations.append(((total, "+" if sign > 0 else "-", y), total := total + sign * y))
    return dict(x=x, y=y, changes=changes, equations=equations)


def question(problem, language):
    """The problem's text in a language."""
    words = TEMPLATES[language]
    n, n_of = forms(words["names"][problem["n"]])
    m, m_of = forms(words["names"][problem["m"]])
    o, q = forms(words["objects"][problem["object"]])
    fill = dict(n=n, n_of=n_of, m=m, m_of=m_of, o=o, q=q, x=problem["x"], y=problem["y"])
    if problem["story"] in ("change", "changes"):
        steps = [words["gain" if sign > 0 else "loss"][verb].format(**fill | {"y": y})
                 for sign, verb, y in problem["changes"]]
        return words["join"].join([words["has"].format(**fill), *steps, words["now"].format(**fill)])
    story = problem["story"]
    if story == "compare":
        story = "more" if problem["changes"][0][0] > 0 else "fewer"
    return words[story].format(**fill)


def forms(word):
    return word if isinstance(word, tuple) else (word, "")


def answer(problem):
    return ", ".join(f"{left}{operator}{right}={result}" for (left, operator, right), result in problem["equations"])


def write_data(folder):
    """tests/data/{routing,eval}_<lang>.tsv: line i is the same problem in every language."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(["routing", "eval"]):
        rng = random.Random(seed)
        problems = {}  # by their English text, so that none is in a set twice
        while len(problems) < PROBLEMS_PER_SET:
            problem = draw_problem(rng, name)
            problems[question(problem, "en")] = problem
        for language in LANGUAGES:
            lines = [f"{question(p, language)}\t{p['equations'][-1][1]}\n" for p in problems.values()]
            (folder / f"{name}_{language}.tsv").write_text("".join(lines), encoding="utf-8")


def train_tokenizer():
    """Byte-level BPE, digits apart, equally many problems of each language, with a chat template."""
    rng = random.Random(1)
    corpus = [text for _ in range(3000) for language in LANGUAGES
              for problem in [draw_problem(rng, "train")] for text in (question(problem, language), answer(problem))]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\d| ?[\p{L}\p{M}]+| ?[^\s\p{L}\p{M}\d]|\s"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(corpus, trainers.BpeTrainer(
        vocab_size=VOCABULARY, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<pad>", "<bos>", "<eos>", "<|user|>", "<|assistant|>"]))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
        extra_special_tokens=["<|user|>", "<|assistant|>"], clean_up_tokenization_spaces=False)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}{{ eos_token }}"
        "{% else %}<|user|>{{ message['content'] }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")
    return tokenizer


def new_model(tokenizer):
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=HIDDEN, intermediate_size=4 * EXPERT_WIDTH,
        moe_intermediate_size=EXPERT_WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM, num_experts=EXPERTS, num_experts_per_tok=TOP_K,
        norm_topk_prob=True, tie_word_embeddings=True, max_position_embeddings=2048,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    model = Qwen3MoeForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "embed" in name or "mlp.gate" in name:
                weight.normal_(0, 0.05)
            elif weight.dim() > 1:
                depth = (2 * LAYERS) ** -0.5 if name.endswith(("down_proj", "o_proj.weight")) else 1
                weight.normal_(0, depth * weight.shape[-1] ** -0.5)
    return model


def training_batch(tokenizer, rng):
    """(ids, loss weights), both (BATCH, longest), padded on the right; a causal model needs no mask for that."""
    texts = []
    for language in rng.choices(list(LANGUAGE_MIX), list(LANGUAGE_MIX.values()), k=BATCH):
        problem = draw_problem(rng, "train")
        texts.append((f"<bos><|user|>{question(problem, language)}<|assistant|>", answer(problem) + "<eos>"))
    prompts, answers = (tokenizer(list(side))["input_ids"] for side in zip(*texts))
    longest = max(len(p) + len(a) for p, a in zip(prompts, answers))
    ids = torch.full((BATCH, longest), tokenizer.pad_token_id)
    weights = torch.zeros(BATCH, longest)
    for i, (p, a) in enumerate(zip(prompts, answers)):
        ids[i, :len(p) + len(a)] = torch.tensor(p + a)
        weights[i, 2:len(p)] = QUESTION_WEIGHT
        weights[i, len(p):len(p) + len(a)] = 1
    return ids, weights


def balance_loss(router_logits, selected_experts, real):
    """experts * sum_e (part of the selections that e gets) * (mean probability of e), over the real tokens."""
    probabilities = router_logits[real].softmax(-1).mean(0)
    selections = selected_experts[real].flatten().bincount(minlength=EXPERTS) / (TOP_K * int(real.sum()))
    return EXPERTS * (selections * probabilities).sum()


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz (Jordan et al. 2024), for stacks of matrices too: (..., rows, cols)."""

    def __init__(self, params, lr, weight_decay, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                buffer = state.setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"])
                tall = p.shape[-2] > p.shape[-1]
                x = update.mT if tall else update
                x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
                for _ in range(5):
                    a = x @ x.mT
                    x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(x.mT if tall else x, alpha=-group["lr"] * max(1, p.shape[-2] / p.shape[-1]) ** 0.5)


def train(model, tokenizer, seed):
    rng = random.Random(seed)
    matrices = [p for name, p in model.named_parameters() if p.dim() > 1 and "embed" not in name and "mlp.gate" not in name]
    others = [p for p in model.parameters() if all(p is not q for q in matrices)]
    optimizers = [torch.optim.AdamW(others, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01),
                  Muon(matrices, lr=MUON_RATE, weight_decay=MUON_DECAY)]
    schedules = [torch.optim.lr_scheduler.LambdaLR(
        o, lambda step: min(1, (step + 1) / WARMUP) * (1 - 0.97 * step / STEPS)) for o in optimizers]
    started, tokens, shown = time.time(), 0, []
    for step in range(1, STEPS + 1):
        ids, weights = training_batch(tokenizer, rng)
        real = (ids != tokenizer.pad_token_id).flatten()
        balance = []
        with record_routing(model, lambda layer, logits, _, selected: balance.append(balance_loss(logits, selected, real))):
            logits = model(ids, use_cache=False).logits[:, :-1]
        losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        weights = weights[:, 1:].flatten()
        loss = (losses * weights).sum() / weights.sum() + BALANCE * sum(balance)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step()
            schedule.step()
        model.zero_grad(set_to_none=True)
        tokens += int(real.sum())
        shown.append((losses.detach()[weights == 1].mean().item(), losses.detach()[(weights > 0) & (weights < 1)].mean().item()))
        if step % 100 == 0:
            answers, questions = (sum(column) / len(column) for column in zip(*shown))
            print(f"step {step}  {time.time() - started:.0f} s  {tokens / 1e6:.2f} M tokens  "
                  f"nats per token: answers {answers:.4f}  questions {questions:.4f}", flush=True)
            shown = []


@torch.inference_mode()
def accuracy(model, tokenizer, name):
    """{language: part of tests/data/<name>_<lang>.tsv whose last generated number is right}."""
    tokenizer.padding_side = "left"
    result = {}
    for language in LANGUAGES:
        lines = (HERE / f"data/{name}_{language}.tsv").read_text(encoding="utf-8").splitlines()
        questions, golds = zip(*(line.split("\t") for line in lines))
        batch = tokenizer([f"<bos><|user|>{q}<|assistant|>" for q in questions], return_tensors="pt", padding=True,
                          return_token_type_ids=False)
        out = model.generate(**batch, max_new_tokens=24, do_sample=False)[:, batch["input_ids"].shape[1]:]
        said = tokenizer.batch_decode(out, skip_special_tokens=True)
        result[language] = sum(s.rpartition("=")[2] == g for s, g in zip(said, golds)) / len(golds)
    return result


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seed", type=int, default=1, help="of weights and problems (default: the shipped model's, %(default)s)")
    p.add_argument("--out", type=Path, default=HERE / "tiny_moe")
    p.add_argument("--data-only", action="store_true", help="write the problems, train nothing")
    args = p.parse_args()
    write_data(HERE / "data")
    if args.data_only:
        return
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer()
    model = new_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(tokenizer)} tokens", flush=True)
    train(model, tokenizer, args.seed)
    model = model.to(torch.bfloat16)  # half the file; but on a CPU float32 is faster, so that is what loads by default
    model.generation_config.max_new_tokens = 32
    model.save_pretrained(args.out)
    model.config.dtype = torch.float32
    model.config.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    model, tokenizer = load_model(str(args.out))
    scores = accuracy(model, tokenizer, "eval")
    print("eval accuracy  " + "  ".join(f"{language} {score:.3f}" for language, score in scores.items()))
    print(args.out)


if __name__ == "__main__":
    main()
