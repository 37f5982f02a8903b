import time
def test_x(consortium, tmp_path):
    t=time.time()
    g=consortium.conduct(consortium.study(), tmp_path/"run")
    print(time.time()-t, consortium.sites, len(g.messages))
    print((tmp_path/"run/journal.jsonl").read_text()[-3000:])
    assert 0
