//! Data sets in their true formats.

use crate::support::{picture, python, shared};
use std::path::Path;
use std::process::Command;
use structvpr::dataset::{open, Dataset};
use structvpr::eval::read_npz_matrices;

fn touch(path: &Path) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, picture(1, 0).to_png().unwrap()).unwrap();
}

fn said(spec: &str) -> String {
    open(spec).map(|_| ()).unwrap_err().to_string()
}

fn names(d: &Dataset) -> Vec<&str> {
    d.references.iter().map(|s| s.name.as_str()).collect()
}

#[test]
fn traverse_and_nordland_match_by_index_in_natural_order() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().display();
    for i in 1..=12 {
        touch(&dir.path().join(format!("summer/img{i}.png")));
        touch(&dir.path().join(format!("winter/img{i}.png")));
    }
    let d = open(&format!("traverse:{root}/winter:{root}/summer,tolerance=1")).unwrap();
    assert_eq!(names(&d)[1..3], ["img2.png", "img3.png"]);
    assert_eq!((&d.positives[0], &d.positives[5], &d.positives[11]), (&vec![0, 1], &vec![4, 5, 6], &vec![10, 11]));
    let n = open(&format!("nordland:{root}")).unwrap();
    assert_eq!(n.positives[5], [3, 4, 5, 6, 7]);
    assert!(n.protocol.contains("+-2"));
    std::fs::remove_file(dir.path().join("winter/img7.png")).unwrap();
    assert!(said(&format!("nordland:{root}")).contains("11 queries and 12 references"));
}

#[test]
fn folders_match_by_pose_or_name() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().display();
    for n in ["a", "b"] {
        touch(&dir.path().join(format!("q/{n}.jpg.png")));
        touch(&dir.path().join(format!("r/{n}.png")));
    }
    std::fs::write(dir.path().join("q/poses.csv"), "name,x,y,heading_deg\na.jpg.png,0,0,0\nb.jpg.png,100,0,350\n").unwrap();
    std::fs::write(dir.path().join("r/poses.csv"), "name,x,y,heading_deg\na,10,0,90\nb,100,5,20\n").unwrap();
    let d = open(&format!("folder:{root}/q:{root}/r,radius=25")).unwrap();
    assert_eq!(d.positives, [vec![0], vec![1]]);
    let d = open(&format!("folder:{root}/q:{root}/r,radius=25,angle=40")).unwrap();
    assert_eq!(d.positives, [vec![], vec![1]], "headings wrap");
    let d = open(&format!("folder:{root}/r:{root}/r,match=name")).unwrap();
    assert_eq!(d.positives, [vec![0], vec![1]]);
    assert!(said(&format!("folder:{root}/q:{root}/r,radios=25")).contains("unknown option `radios`"));
    assert!(said(&format!("folder:{root}/q")).contains("usage: folder:QUERY_DIR"));
    assert!(said(&format!("folder:{root}/q:{root}/nothing")).contains("nothing"));
    std::fs::write(dir.path().join("r/poses.csv"), "name,x,y\na,10,0\n").unwrap();
    assert!(said(&format!("folder:{root}/q:{root}/r")).contains("no pose for `b.png`"));
}

#[test]
fn coordinates_from_file_names_and_pitts30k_folders() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().display();
    for (side, n) in [
        ("queries", "@0585001.55@4476000.00@17@T@.png"),
        ("database", "@0585020.00@4476000.00@17@T@.png"),
        ("database", "@0585099.00@4476000.00@x.png"),
    ] {
        touch(&dir.path().join("images/test").join(side).join(n));
    }
    let d = open(&format!("pitts30k:{root}")).unwrap();
    assert_eq!(d.positives, [vec![0]]);
    let d = open(&format!("utm:{root}/images/test/queries:{root}/images/test/database,radius=100")).unwrap();
    assert_eq!(d.positives, [vec![0, 1]]);
    touch(&dir.path().join("images/test/queries/plain.png"));
    assert!(said(&format!("pitts30k:{root}")).contains("plain.png"));
}

#[test]
fn pitts30k_dbstruct_as_matlab_and_published_truth() {
    let Some(python) = python("pitts30k_dbstruct") else { return };
    let dir = tempfile::tempdir().unwrap();
    let code = "
import sys, os, numpy as np, scipy.io as io
d = sys.argv[1]
os.makedirs(d + '/datasets'); os.makedirs(d + '/images/test/queries'); os.makedirs(d + '/images/test/database')
cell = lambda names: np.array([[n] for n in names], dtype=object)
db = dict(whichSet='test', dbImageFns=cell(['000/a.jpg', '000/b.jpg', '001/c.jpg']), utmDb=np.array([[585001.5, 585020, 585200], [4476000.25, 4476000, 4476000]]),
          qImageFns=cell(['q/1.jpg', 'q/2.jpg']), utmQ=np.array([[585005.0, 585900], [4476000.0, 4476000]]), numImages=3, numQueries=2, posDistThr=25, posDistSqThr=625)
for split, z in (('test', True), ('val', False)):
    io.savemat(f'{d}/datasets/pitts30k_{split}.mat', {'dbStruct': db, 'extra': 3}, do_compression=z)
np.savez(d + '/truth.npz', utmQ=db['utmQ'].T, utmDb=db['utmDb'].T, posDistThr=25)
";
    let out = Command::new(python).args(["-c", code]).arg(dir.path()).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let root = dir.path().display();
    for split in ["test", "val"] {
        let d = open(&format!("pitts30k:{root},split={split}")).unwrap();
        assert_eq!((d.positives.clone(), names(&d)), (vec![vec![0, 1], vec![]], vec!["000/a.jpg", "000/b.jpg", "001/c.jpg"]), "{split}");
        assert!(d.queries[1].path.ends_with("queries_real/q/2.jpg"));
    }
    // Damage is an error that names the file.
    let mat = dir.path().join("datasets/pitts30k_test.mat");
    let whole = std::fs::read(&mat).unwrap();
    for cut in (0..whole.len()).step_by(37) {
        std::fs::write(&mat, &whole[..cut]).unwrap();
        if let Err(e) = open(&format!("pitts30k:{root}")) {
            assert!(e.to_string().contains("pitts30k_test.mat"), "{e}");
        }
    }
    std::fs::remove_file(&mat).unwrap();
    for n in ["queries/1.png", "queries/2.png", "database/1.png", "database/2.png", "database/3.png"] {
        touch(&dir.path().join("images/test").join(n));
    }
    let d = open(&format!("pitts30k:{root},truth={root}/truth.npz")).unwrap();
    assert_eq!(d.positives, [vec![0, 1], vec![]]);
}

#[test]
fn msls_tables_are_read_by_column_name() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let table = |city: &str, side: &str, rows: &[(&str, f64, f64, &str, &str, &str)]| {
        let base = root.join("train_val").join(city).join(side);
        let (mut raw, mut post, mut sub) = (
            ",key,lon,lat,ca,captured_at,pano\n".to_string(),
            ",key,easting,northing,unique_cluster,control_panel,night,view_direction\n".to_string(),
            ",all,s2w,w2s,o2n,n2o,d2n,n2d\n".to_string(),
        );
        for (i, (key, e, n, ca, pano, night)) in rows.iter().enumerate() {
            touch(&base.join("images").join(format!("{key}.jpg")));
            raw += &format!("{i},{key},1.0,2.0,{ca},2018-01-01,{pano}\n");
            post += &format!("{i},{key},{e},{n},{i},False,{night},Forward\n");
            sub += &format!("{i},True,False,False,False,False,{night},False\n");
        }
        for (name, text) in [("raw.csv", raw), ("postprocessed.csv", post), ("subtask_index.csv", sub)] {
            std::fs::write(base.join(name), text).unwrap();
        }
    };
    table("cph", "query", &[("q1", 0.0, 0.0, "10.0", "False", "True"), ("q2", 500.0, 0.0, "10.0", "False", "False")]);
    table(
        "cph",
        "database",
        &[("d1", 10.0, 0.0, "355.0", "False", "True"), ("d2", 5.0, 0.0, "90.0", "False", "True"), ("p", 0.0, 0.0, "10.0", "True", "True")],
    );
    table("sf", "query", &[("q3", 0.0, 0.0, "0", "False", "True")]);
    table("sf", "database", &[("d3", 24.0, 0.0, "39.0", "False", "True")]);
    let d = open(&format!("msls:{}", root.display())).unwrap();
    assert_eq!(names(&d), ["cph/d1", "cph/d2", "sf/d3"], "panoramas are left out");
    assert_eq!(d.positives, [vec![0], vec![], vec![2]], "25 m and 40 degrees, each city for itself");
    let d = open(&format!("msls:{},cities=cph,subtask=d2n", root.display())).unwrap();
    assert_eq!(d.queries.len(), 1);
    assert!(said(&format!("msls:{},subtask=x2y", root.display())).contains("no subtask `x2y`"));
    assert!(said(&format!("msls:{},cities=oslo", root.display())).contains("oslo"));
}

#[test]
fn unknown_kinds_and_empty_folders_say_what_is_known() {
    assert!(said("foo:/x").contains("unknown kind `foo`; kinds: folder, traverse"));
    assert!(said("/just/a/path").contains("is not KIND:PATH"));
    let dir = tempfile::tempdir().unwrap();
    let d = dir.path().display();
    assert!(said(&format!("traverse:{d}:{d}")).contains("has no queries"));
}

#[test]
fn published_ground_truth_files_are_read() {
    let Some(dir) = shared("published_ground_truth_files_are_read", "data/vprbench_corridor/datasets") else { return };
    for (name, rows) in
        [("corridor", 111), ("Pittsburgh", 1000), ("Nordland", 2760), ("17places", 406), ("Tokyo247", 315), ("SPEDTEST", 607)]
    {
        let bytes = std::fs::read(dir.join(name).join("ground_truth_new.npy")).unwrap();
        let truth = structvpr::dataset::parse_vprbench_truth(&bytes).unwrap();
        assert_eq!(truth.len(), rows, "{name}");
        assert_eq!(truth[1].0, 1, "{name}");
        for cut in (0..bytes.len()).step_by(bytes.len() / 50) {
            let _ = structvpr::dataset::parse_vprbench_truth(&bytes[..cut]);
        }
    }
    let nordland = std::fs::read(dir.join("Nordland/ground_truth_new.npy")).unwrap();
    assert_eq!(structvpr::dataset::parse_vprbench_truth(&nordland).unwrap()[1].1, [9, 10, 11]);
    let npz = std::fs::read(dir.join("../../ground_truth/pitts30k_test.npz")).unwrap();
    let arrays = read_npz_matrices(&npz).unwrap();
    assert_eq!((arrays["utmQ"].rows, arrays["utmDb"].rows, arrays["posDistThr"].data[0]), (6816, 10_000, 25.0));
}

#[test]
fn a_manifest_matches_by_place_or_by_distance_and_names_what_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("set.csv");
    let open_with = |text: &str| {
        std::fs::write(&file, text).unwrap();
        open(&format!("manifest:{},radius=5", file.display()))
    };
    let d = open_with("image,side,place\na/1.jpg,query,a\na/2.jpg,reference,a\nb/1.jpg,both,b\nb/2.jpg,reference,b\n").unwrap();
    assert_eq!(names(&d), ["a/2.jpg", "b/1.jpg", "b/2.jpg"]);
    assert_eq!(d.positives, [vec![0], vec![2]], "an image is not its own place's other image");
    assert!(d.queries[0].path == dir.path().join("a/1.jpg") && d.query_places.is_empty());
    let d = open_with("image,side,x,y,heading_deg\n1.jpg,query,0,0,\n2.jpg,reference,3,4,90\n3.jpg,reference,30,4,\n").unwrap();
    assert_eq!(d.positives, [vec![0]]);
    assert_eq!(d.reference_places[0].pose.heading_deg, Some(90.0));
    for (text, want) in [
        ("image,place\n1.jpg,a\n", "no column `side`"),
        ("image,side\n1.jpg,query\n", "no column `x`"),
        ("image,side,place\n1.jpg,left,a\n", "side `left`"),
        ("image,side,x,y\n1.jpg,query,0,north\n", "`north` in column `y`"),
        ("image,side,place\n,query,a\n", "column `image` is empty"),
        ("image,side,place\n1.jpg,query,a\n", "no references"),
    ] {
        let said = open_with(text).map(|_| ()).unwrap_err().to_string();
        assert!(said.contains(want), "{text}: {said}");
    }
}
