/** The one place that knows three.js: a model in the middle, light on it, a camera around it. */
import {
  AmbientLight,
  Box3,
  DirectionalLight,
  Material,
  Mesh,
  PerspectiveCamera,
  Scene,
  Sphere,
  Spherical,
  Texture,
  Vector3,
  WebGLRenderer,
} from "three";
import { OrbitControls } from "three/addons/controls/OrbitControls.js";
import { GLTFLoader } from "three/addons/loaders/GLTFLoader.js";

const FIELD_OF_VIEW_DEG = 35;
const START = { elevationRad: 0.35, azimuthRad: 0.6 };
const MAX_PIXEL_RATIO = 2;

export interface Stage {
  readonly numTriangles: number;
  /** Turns the camera around the model: to the right and down, in radians. */
  turn(azimuth: number, polar: number): void;
  zoom(factor: number): void;
  reset(): void;
  spin(on: boolean): void;
  close(): void;
}

/** Shows a GLB on the canvas; throws where the browser has no WebGL or the file is not a GLB. */
export async function openStage(canvas: HTMLCanvasElement, glb: ArrayBuffer): Promise<Stage> {
  const { scene: model } = await new GLTFLoader().parseAsync(glb, "");
  const renderer = new WebGLRenderer({ canvas, alpha: true, antialias: true });
  const sphere = new Box3().setFromObject(model).getBoundingSphere(new Sphere());
  const scene = litScene().add(model);
  const camera = new PerspectiveCamera(FIELD_OF_VIEW_DEG, 1, sphere.radius / 100, sphere.radius * 100);
  const controls = new OrbitControls(camera, canvas);
  const distance = (1.05 * sphere.radius) / Math.sin((FIELD_OF_VIEW_DEG / 2) * (Math.PI / 180));
  Object.assign(controls, { enablePan: false, minDistance: distance / 8, maxDistance: distance * 4 });
  controls.autoRotateSpeed = 1.5;
  let changed = true;
  controls.addEventListener("change", () => (changed = true));

  const look = (way: Spherical) => {
    const polar = Math.min(Math.PI - 0.05, Math.max(0.05, way.phi));
    const away = Math.min(controls.maxDistance, Math.max(controls.minDistance, way.radius));
    camera.position.setFromSphericalCoords(away, polar, way.theta).add(controls.target);
    controls.update();
    changed = true;
  };
  const from = () => new Spherical().setFromVector3(new Vector3().subVectors(camera.position, controls.target));
  const reset = () => {
    controls.target.copy(sphere.center);
    look(new Spherical(distance, Math.PI / 2 - START.elevationRad, START.azimuthRad));
  };

  const sized = new ResizeObserver(() => {
    renderer.setPixelRatio(Math.min(devicePixelRatio, MAX_PIXEL_RATIO));
    renderer.setSize(canvas.clientWidth, canvas.clientHeight, false);
    camera.aspect = canvas.clientWidth / Math.max(1, canvas.clientHeight);
    camera.updateProjectionMatrix();
    changed = true;
  });
  sized.observe(canvas);
  reset();
  renderer.setAnimationLoop(() => {
    controls.update();
    if (changed) renderer.render(scene, camera);
    changed = false;
  });

  return {
    numTriangles: countTriangles(model),
    turn: (azimuth, polar) => {
      const way = from();
      look(new Spherical(way.radius, way.phi + polar, way.theta + azimuth));
    },
    zoom: (factor) => {
      const way = from();
      look(new Spherical(way.radius / factor, way.phi, way.theta));
    },
    reset,
    spin: (on) => (controls.autoRotate = on),
    close: () => {
      renderer.setAnimationLoop(null);
      sized.disconnect();
      controls.dispose();
      dispose(model);
      renderer.dispose();
    },
  };
}

/** Even light for the most part, so that colours stay what was made; a key and a rim light show the shape. */
function litScene(): Scene {
  const key = new DirectionalLight("#fff4e6", 1.3);
  key.position.set(2, 3, 2.5);
  const rim = new DirectionalLight("#dfeaff", 0.6);
  rim.position.set(-2, 1.5, -2);
  return new Scene().add(new AmbientLight("#ffffff", 2.3), key, rim);
}

function meshesOf(model: { traverse(visit: (node: object) => void): void }): Mesh[] {
  const meshes: Mesh[] = [];
  model.traverse((node) => node instanceof Mesh && meshes.push(node));
  return meshes;
}

function countTriangles(model: Parameters<typeof meshesOf>[0]): number {
  const corners = meshesOf(model).map(({ geometry }) => geometry.index?.count ?? geometry.attributes.position!.count);
  return corners.reduce((sum, count) => sum + count, 0) / 3;
}

/** The graphics card's memory is not collected by itself. */
function dispose(model: Parameters<typeof meshesOf>[0]): void {
  for (const { geometry, material } of meshesOf(model)) {
    geometry.dispose();
    for (const each of ([] as Material[]).concat(material)) {
      for (const value of Object.values(each)) if (value instanceof Texture) value.dispose();
      each.dispose();
    }
  }
}
